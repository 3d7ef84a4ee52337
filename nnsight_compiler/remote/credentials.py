"""Which service is meant, and the API key for it: from the environment, else from a file that only its owner reads."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import final
from urllib.parse import urlsplit

from nnsight_compiler.files.document import parse
from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.remote.refusals import NoServiceError, ServiceError, shown

HOST, KEY = "NNSIGHT_HOST", "NNSIGHT_API_KEY"

_KEY = re.compile(r"[\x21-\x7e]{1,512}")


def address(text: str) -> str:
    """The address of a service, in the one form that it is kept and compared in.

    Raises:
        NoServiceError: it is none.
    """
    try:
        parts = urlsplit(text.strip())
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise NoServiceError(f"{shown(repr(text), 200)} is no address of a service: {error}") from None
    if "@" in parts.netloc:
        raise NoServiceError(
            f"the address of {host or 'a service'} holds a name or a key, which would end up in logs\n"
            f"  way out: leave it out, and give the key by `nnsightc login` or {KEY}"
        )
    if parts.scheme not in ("http", "https") or not host:
        example = f"http://{text.strip()}" if re.fullmatch(r"[\w.-]+(:\d+)?", text.strip()) else "http://localhost:8473"
        raise NoServiceError(f"{shown(repr(text), 200)} is no address of a service\n  way out: write it like {example}")
    if parts.query or parts.fragment:
        raise NoServiceError(f"{shown(repr(text), 200)} has a `?` or a `#`, which no address of a service has")
    shown_host = f"[{host}]" if ":" in host else host
    default = {"http": 80, "https": 443}[parts.scheme]
    end = "" if port in (None, default) else f":{port}"
    return f"{parts.scheme}://{shown_host}{end}{parts.path.rstrip('/')}"


def known_host() -> str:
    """The service that is meant where none is named: of the environment, else the one that was logged in to last.

    Raises:
        NoServiceError: there is none.
    """
    host = os.environ.get(HOST) or Logins.read().latest
    if not host:
        raise NoServiceError(
            "it is not known which service runs this\n"
            f'  way out: run `nnsightc login URL`, set {HOST}, or name it: remote="http://localhost:8473"'
        )
    return address(host)


def key_for(host: str) -> str | None:
    """The API key for a service, if one is known. That of the environment is for the host of the environment alone,
    where one is named there."""
    key = os.environ.get(KEY)
    meant = os.environ.get(HOST)
    if key and (not meant or address(meant) == host):
        return checked_key(key, KEY)
    return Logins.read().keys.get(host)


def checked_key(key: str, where: str) -> str:
    """A key as it can stand in a header.

    Raises:
        ServiceError: it cannot. What it is stands in no message.
    """
    plain = key.strip()
    if not _KEY.fullmatch(plain):
        raise ServiceError(f"{where} is no API key: a key has 1 to 512 printable characters, without spaces")
    return plain


@final
@dataclass(slots=True)
class Logins:
    """The services that were logged in to, by address, with the key for each (none where a service wants none)."""

    latest: str | None = None
    keys: dict[str, str | None] = field(default_factory=dict)

    @staticmethod
    def file() -> Path:
        """Where they are kept."""
        base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        return Path(base) / "nnsight-compiler" / "credentials.json"

    @classmethod
    def read(cls) -> Logins:
        """What is kept.

        Raises:
            ServiceError: the file can be read by others, or is damaged.
        """
        file = cls.file()
        try:
            with file.open("rb") as stream:
                mode = os.fstat(stream.fileno()).st_mode
                data = stream.read(2**20)
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise ServiceError(f"{file} cannot be read: {error.strerror or error}") from None
        if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
            raise ServiceError(f"others can read the API keys in {file}\n  way out: chmod 600 {file}")
        try:
            found = parse(data.decode())
            assert isinstance(found, dict)
            latest, keys = found["latest"], found["services"]
            assert latest is None or isinstance(latest, str)
            return cls(latest, {address(host): _key_or_none(key) for host, key in keys.items()})
        except (FileError, ServiceError, UnicodeDecodeError, AssertionError, KeyError, AttributeError):
            raise ServiceError(f"{file} is damaged\n  way out: delete it, and run `nnsightc login URL` again") from None

    def write(self) -> None:
        """Keeps these instead of what was kept, whole or not at all."""
        file = self.file()
        text = json.dumps({"latest": self.latest, "services": self.keys}, indent=2) + "\n"
        beside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            opened = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(opened, "w") as stream:
                    stream.write(text)
                os.replace(beside, file)
            finally:
                beside.unlink(missing_ok=True)
        except OSError as error:
            raise ServiceError(f"{file} cannot be written: {error.strerror or error}") from None


def _key_or_none(key: object) -> str | None:
    assert key is None or isinstance(key, str)
    return None if key is None else checked_key(key, "what is kept")
