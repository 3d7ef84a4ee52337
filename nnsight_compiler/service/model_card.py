"""What clients are told of a model, so that they can write, check and compile experiments without its weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.models import LanguageModel
from nnsight_compiler.models.names import NoStandardModule, stands_for
from nnsight_compiler.service.engine import Data


def model_card(model: LanguageModel) -> Data:
    """The model as JSON: its class and configuration, the dtype of its weights, their bytes, how many layers it has,
    and each module by its path, with its class and the shapes of its own parameters."""
    module = model._wrapped
    dtype = getattr(module, "dtype", None)
    return {
        "class": type(module).__name__,
        "config": _config(module),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()),
        "layers": _layers(module),
        "modules": [
            {
                "path": path,
                "class": type(part).__name__,
                "parameters": {name: list(held.shape) for name, held in part.named_parameters(recurse=False)},
            }
            for path, part in module.named_modules(remove_duplicate=False)
        ],
    }


def tokenizer_files(model: LanguageModel) -> Mapping[str, bytes]:
    """The files of the model's tokenizer; none where it has none."""
    try:
        tokenizer = model.tokenizer
    except ModelError:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def _config(module: nn.Module) -> Data:
    config = getattr(module, "config", None)
    if config is None:
        return {}
    known: Data = json.loads(config.to_json_string(use_diff=False))
    known.pop("_name_or_path", None)  # clients have no use for a folder of this machine
    return known


def _layers(module: nn.Module) -> int:
    """How many layers a model has; 0 where no one list is of layers."""
    try:
        path = stands_for(module, "layers")
    except NoStandardModule:
        return 0
    assert path is not None
    return len(list(module.get_submodule(path).children()))
