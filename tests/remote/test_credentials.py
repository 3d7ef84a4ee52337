"""Which service is meant and which key it gets: from the environment, or from a file; logging in and out."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from scripted_service import ScriptedService

from nnsight_compiler.cli import login, main
from nnsight_compiler.remote.client import connect
from nnsight_compiler.remote.credentials import Logins, address, key_for, known_host
from nnsight_compiler.remote.refusals import NoServiceError, ServiceError

KEY = "a-key-that-nobody-sees"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has never logged in."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("NNSIGHT_HOST", "NNSIGHT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with ScriptedService() as started:
        started.models = {name: {"card": {"name": name, "class": "GPT2LMHeadModel"}} for name in ("tiny", "small")}
        yield started


# --- addresses ---


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("http://localhost:8473/", "http://localhost:8473"),
        (" HTTPS://Models.Example.org:443 ", "https://models.example.org"),
        ("http://[::1]:8473/serve/", "http://[::1]:8473/serve"),
    ],
)
def test_an_address_has_one_form(text: str, plain: str) -> None:
    assert address(text) == plain
    assert address(plain) == plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu01:8473", "'gpu01:8473' is no address of a service\n  way out: write it like http://gpu01:8473"),
        ("", "'' is no address of a service\n  way out: write it like http://localhost:8473"),
        ("ftp://a", "'ftp://a' is no address of a service\n  way out: write it like http://localhost:8473"),
        ("http://a:port", "'http://a:port' is no address of a service: Port could not be cast to integer value as "
         "'port'"),
        ("http://a/?key=k", "'http://a/?key=k' has a `?` or a `#`, which no address of a service has"),
        (
            f"http://me:{KEY}@a",
            "the address of a holds a name or a key, which would end up in logs\n"
            "  way out: leave it out, and give the key by `nnsightc login` or NNSIGHT_API_KEY",
        ),
    ],
)  # fmt: skip
def test_what_is_no_address(text: str, message: str) -> None:
    with pytest.raises(NoServiceError) as raised:
        address(text)
    assert str(raised.value) == message


def test_without_a_service_it_is_said_how_to_name_one() -> None:
    with pytest.raises(NoServiceError) as raised:
        known_host()
    assert str(raised.value) == (
        "it is not known which service runs this\n"
        '  way out: run `nnsightc login URL`, set NNSIGHT_HOST, or name it: remote="http://localhost:8473"'
    )


# --- where a key goes ---


def test_a_key_of_the_environment_goes_to_the_host_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNSIGHT_API_KEY", KEY)
    assert key_for("http://a") == KEY
    monkeypatch.setenv("NNSIGHT_HOST", "http://a/")
    assert known_host() == "http://a"
    assert key_for("http://a") == KEY
    assert key_for("http://b") is None
    assert key_for("https://a") is None
    assert key_for("http://a:81") is None


def test_the_environment_comes_before_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    Logins("http://a", {"http://a": "kept", "http://b": None}).write()
    assert (known_host(), key_for("http://a"), key_for("http://b")) == ("http://a", "kept", None)
    monkeypatch.setenv("NNSIGHT_HOST", "http://a")
    monkeypatch.setenv("NNSIGHT_API_KEY", KEY)
    assert key_for("http://a") == KEY


def test_connections_are_shared_by_address_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    first = connect("http://localhost:1/")
    assert connect("http://localhost:1") is first
    monkeypatch.setenv("NNSIGHT_HOST", "http://localhost:1")
    assert connect() is first
    monkeypatch.setenv("NNSIGHT_API_KEY", KEY)
    assert connect() is not first


@pytest.mark.parametrize("key", ["two words", "k\nX-Header: 1", "ü", "k" * 513])
def test_a_key_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("NNSIGHT_API_KEY", key)
    with pytest.raises(ServiceError) as raised:
        key_for("http://a")
    assert str(raised.value) == (
        "NNSIGHT_API_KEY is no API key: a key has 1 to 512 printable characters, without spaces"
    )


# --- the file ---


def test_the_file_is_for_its_owner_alone(home: Path) -> None:
    Logins("http://a", {"http://a": KEY}).write()
    file = home / "nnsight-compiler/credentials.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert os.listdir(file.parent) == ["credentials.json"]
    file.chmod(0o640)
    with pytest.raises(ServiceError) as raised:
        key_for("http://a")
    assert str(raised.value) == f"others can read the API keys in {file}\n  way out: chmod 600 {file}"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"latest": 3, "services": {}}', '{"latest": null, "services": {"http://a": 3}}', "\udcff",
     '{"latest": null, "services": {"a": null}}', '{"latest": null, "services": {"http://a": "two words"}}'],
)  # fmt: skip
def test_a_damaged_file(home: Path, text: str) -> None:
    file = home / "nnsight-compiler/credentials.json"
    file.parent.mkdir()
    file.write_bytes(text.encode(errors="surrogateescape"))
    file.chmod(0o600)
    with pytest.raises(ServiceError) as raised:
        Logins.read()
    assert str(raised.value) == f"{file} is damaged\n  way out: delete it, and run `nnsightc login URL` again"


def test_a_folder_that_cannot_be_written(home: Path) -> None:
    (home / "nnsight-compiler").write_text("no folder")
    with pytest.raises(ServiceError, match=r"credentials\.json cannot be written: "):
        Logins().write()


# --- the command line ---


@dataclass
class Outcome:
    code: object
    out: str
    err: str


@pytest.fixture
def nnsightc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: str, key: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["nnsightc", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{key}\n"))
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        assert KEY not in captured.out + captured.err
        return Outcome(exit_.value.code or 0, captured.out, captured.err)

    return call


def test_logging_in_and_out(nnsightc: Callable[..., Outcome], service: ScriptedService, home: Path) -> None:
    service.key = KEY
    file = home / "nnsight-compiler/credentials.json"
    outcome = nnsightc("login", service.url, key=KEY)
    assert outcome == Outcome(0, f"logged in to {service.url}, which serves tiny, small\nkept in {file}\n", "")
    assert json.loads(file.read_text()) == {"latest": service.url, "services": {service.url: KEY}}
    assert (known_host(), key_for(service.url)) == (service.url, KEY)
    outcome = nnsightc("logout")
    assert outcome.out == (
        f"logged out of {service.url}; the key itself stays valid until whoever runs the service revokes it\n"
    )
    assert key_for(service.url) is None
    outcome = nnsightc("logout")
    assert outcome == Outcome(
        2, "", "error: you are not logged in to any service\n  way out: there is nothing to forget\n"
    )


def test_a_service_that_wants_no_key(nnsightc: Callable[..., Outcome], service: ScriptedService) -> None:
    assert nnsightc("login", service.url).code == 0
    assert (known_host(), key_for(service.url)) == (service.url, None)


def test_a_key_that_is_refused_is_not_kept(nnsightc: Callable[..., Outcome], service: ScriptedService) -> None:
    service.key = "another"
    outcome = nnsightc("login", service.url, key=KEY)
    assert outcome.code == 1
    assert outcome.err == (
        f"error: {service.url} does not accept the API key: no such key\n"
        f"  way out: run `nnsightc login {service.url}` with one that is valid, or set NNSIGHT_API_KEY\n"
    )
    assert Logins.read() == Logins()


def test_several_services(
    nnsightc: Callable[..., Outcome], service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    Logins("http://first", {"http://first": None}).write()
    monkeypatch.setenv("NNSIGHT_HOST", "http://first")
    outcome = nnsightc("login", service.url)
    assert outcome.err == "note: NNSIGHT_HOST is set, and names another service: remote=True runs there\n"
    monkeypatch.delenv("NNSIGHT_HOST")
    assert known_host() == service.url
    assert nnsightc("logout", "http://second").err == (
        f"error: you are not logged in to http://second\n  way out: name one of: http://first, {service.url}\n"
    )
    assert nnsightc("logout").out.endswith("remote=True runs at http://first now\n")
    assert known_host() == "http://first"


def test_login_needs_an_address(nnsightc: Callable[..., Outcome]) -> None:
    outcome = nnsightc("login")
    assert outcome == Outcome(
        2,
        "",
        "error: it is not said which service is meant\n  way out: write nnsightc login URL, or set NNSIGHT_HOST\n",
    )


def test_the_key_is_typed_unseen_at_a_terminal(
    service: ScriptedService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    asked: list[str] = []

    def getpass(prompt: str) -> str:
        asked.append(prompt)
        return f" {KEY} "

    service.key = KEY
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(login.getpass, "getpass", getpass)
    login.login(service.url)
    assert asked == [f"API key for {service.url} (empty where it wants none): "]
    assert KEY not in capsys.readouterr().out
    assert key_for(service.url) == KEY
