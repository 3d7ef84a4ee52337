"""Where a language model's weights come from: a folder, a GGUF file, or a repository of the Hugging Face hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import nn

from nnsight_compiler.ir.errors import ModelError

HUB_OPTIONS = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download", "trust_remote_code")
"""Options of `from_pretrained` that say where files are; the configuration and the tokenizer take them too."""

_FORM_OPTIONS = ("attn_implementation", "trust_remote_code")
"""Options that say which modules the model is made of."""


class Source(Protocol):
    """Where a model comes from that is not in memory yet."""

    def empty(self) -> nn.Module:
        """The model without its weights, on the meta device."""

    def load(self) -> nn.Module:
        """The model with its weights."""

    def tokenizer(self) -> Any:
        """The tokenizer that belongs to it."""


def tiny_folder() -> Path:
    """The folder of the model that comes with this package: a GPT-2 of three layers which knows a few facts."""
    return Path(str(files("nnsight_compiler.models"))) / "tiny"


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that is not in memory yet: what `from_pretrained` is to be given."""

    name: str
    gguf_file: str | None = None
    dtype: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(Path(self.name) / self.gguf_file) if self.gguf_file else self.name

    def empty(self) -> nn.Module:
        """The model without its weights, on the meta device."""
        from transformers import AutoConfig

        options = {name: self.options[name] for name in _FORM_OPTIONS if name in self.options}
        with _one_line(f"{self}: its configuration cannot be read"):
            config = self.options.get("config") or AutoConfig.from_pretrained(self.name, **self._where)
            dtype = self.dtype if self.dtype not in (None, "auto") else getattr(config, "dtype", None)
            with torch.device("meta"):
                model: nn.Module = _causal_models().from_config(config, dtype=dtype, **options)
        return model.eval()

    def load(self) -> nn.Module:
        """The model with its weights, all of which must be in the checkpoint."""
        options = {**self.options, **self._where, **({"dtype": self.dtype} if self.dtype is not None else {})}
        with _one_line(f"{self}: its weights cannot be loaded"):
            model, report = _causal_models().from_pretrained(self.name, output_loading_info=True, **options)
        lacking = sorted(report["missing_keys"])
        if lacking:
            raise ModelError(
                f"{self} lacks {len(lacking)} of the model's weights ({', '.join(lacking[:3])}"
                f"{', …' if len(lacking) > 3 else ''}), which would be random; if that is meant, load the model with"
                " transformers and give it to LanguageModel"
            )
        loaded: nn.Module = model.eval()
        return loaded

    def tokenizer(self) -> Any:
        """The tokenizer that lies beside the weights."""
        from transformers import AutoTokenizer

        way_out = "give one as `tokenizer=`, or token ids as input"
        with _one_line(f"{self}: its tokenizer cannot be loaded", way_out):
            tokenizer = AutoTokenizer.from_pretrained(self.name, **self._where)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up from the configuration, for want of files
            raise ModelError(f"{self} comes without a tokenizer; {way_out}")
        return tokenizer

    @property
    def _where(self) -> dict[str, Any]:
        where = {name: self.options[name] for name in HUB_OPTIONS if name in self.options}
        return {**where, "gguf_file": self.gguf_file} if self.gguf_file else where


def locate(source: str | Path, dtype: Any, options: Mapping[str, Any]) -> Checkpoint:
    """What a user's name for a model means: `tiny`, a GGUF file, a folder, or else a repository of the hub."""
    if source == "tiny":
        return Checkpoint(str(tiny_folder()), None, dtype, options)
    path = Path(source).expanduser()
    if path.is_file():
        _check_gguf(path)
        return Checkpoint(str(path.parent), path.name, dtype, options)
    if path.is_dir():
        if not (path / options.get("subfolder", "") / "config.json").is_file() and "gguf_file" not in options:
            found = sorted(file.name for file in path.glob("*.gguf"))
            raise ModelError(
                f"{source} is a folder without a config.json"
                + (f"; name the GGUF file itself: {path / found[0]}" if found else ", so not a transformers model")
            )
        return Checkpoint(str(path), None, dtype, options)
    text = str(source)
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.endswith(".gguf") or text.count("/") > 1:
        raise ModelError(f"there is no file or folder {source} (a model of the hub is named `owner/name`)")
    return Checkpoint(text, None, dtype, options)


def _causal_models() -> Any:  # `Any`: its methods are not typed
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: give the folder of a transformers model, or a .gguf file")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {path} needs the package gguf: pip install gguf")


@contextmanager
def _one_line(what: str, way_out: str = "check the name and the files, or give a transformers model") -> Iterator[None]:
    """Turns whatever a loader raises into one line; the loader's own error stays attached as the cause."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors, huggingface_hub and gguf each raise their own
        reason = " ".join(str(error).split("\n")[0].split()) or "no reason given"
        raise ModelError(f"{what}: {type(error).__name__}: {reason[:300]}; {way_out}") from error
