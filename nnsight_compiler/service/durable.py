"""Files that are on the disk for good once they are there: written, synced, and their folder synced.

A file is named at random, and counts when a row of the database names it; one that no row names is taken away at the
next start. So nothing needs to be renamed, and what was half written when the power failed is nobody's.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import IO, final

from nnsight_compiler.service.engine import Content
from nnsight_compiler.service.records import NoSpaceError, StoreError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PIECE = 2**20
"""Files are read by so many bytes."""


@final
@dataclass(frozen=True, slots=True)
class Staged:
    """What is ready to be kept: a file that is complete and synced, and that no row names yet; or, of what is small,
    the content itself, which goes into the database."""

    content: Content
    bytes: int
    sha256: str

    @property
    def file(self) -> str | None:
        """The name of the file, where there is one."""
        return self.content.name if isinstance(self.content, Path) else None


def staged(data: bytes) -> Staged:
    """Content that is small."""
    return Staged(data, len(data), hashlib.sha256(data).hexdigest())


def stage(folder: Path, data: Content) -> Staged:
    """A new file in a folder, with this content; a file that is there already is moved, or copied from another disk.

    Raises:
        NoSpaceError: the disk is full.
        StoreError: the disk fails; or what is given as a file is a link or a device.
    """
    path = folder / secrets.token_hex(16)
    with _whole(path):
        if isinstance(data, Path):
            if not S_ISREG(data.lstat().st_mode):  # a link could bring in any file of the service's
                raise StoreError(f"{data} is no ordinary file")
            digest, size = hash_of(data)
            _move(data, path)
            with open(path, "r+b") as file:
                sync(file.fileno())
        else:
            digest, size = hashlib.sha256(data).hexdigest(), len(data)
            with open(path, "xb", buffering=0) as file:
                write_all(file, data)
                sync(file.fileno())
        sync_folder(folder)
    return Staged(path, size, digest)


def digest_of(data: Content | Staged) -> str:
    """The sha256 of some content, in hex."""
    return data.sha256 if isinstance(data, Staged) else hash_of(data)[0]


def hash_of(data: Content) -> tuple[str, int]:
    """The sha256 of some content in hex, and its length."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest(), len(data)
    digest, size = hashlib.sha256(), 0
    with open(data, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size


def discard(data: Content | Staged) -> None:
    """Takes a file away that is given and not used, if it is still where it was."""
    content = data.content if isinstance(data, Staged) else data
    if isinstance(content, Path):
        content.unlink(missing_ok=True)


def write_all(file: IO[bytes], data: bytes) -> None:
    """Writes every byte; a disk that takes only some of them is full at the next."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Returns when what was written to a file is on the disk."""
    os.fsync(descriptor)


def _move(source: Path, path: Path) -> None:
    try:
        os.rename(source, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copyfile(source, path)
        source.unlink()


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Around what writes a file: takes it away where that fails, and raises NoSpaceError where the disk is full, else
    StoreError."""
    try:
        yield
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno in FULL:
            raise NoSpaceError(f"no space for {path}: {error.strerror}") from error
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error
