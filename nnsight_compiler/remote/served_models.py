"""The models of a service, without their weights: names, module trees and tokenizers, so that experiments can be
written, checked and compiled here and run there.

Nothing that a service sends is executed: a configuration is data for classes that transformers has, of bounded size,
and a tokenizer is made of data files alone.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final
from urllib.parse import quote

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.models.checkpoint import Checkpoint
from nnsight_compiler.remote.answers import Fields
from nnsight_compiler.remote.client import connect
from nnsight_compiler.remote.connection import Connection
from nnsight_compiler.remote.refusals import AnswerError, NotThereError, shown

MAX_MODULES = 200_000
"""The largest models have some thousands of modules, or some ten thousands where each expert is one."""
MAX_NUMBER = 2**31
"""What a configuration counts (layers, widths, words, positions) is less. Floats are not bounded."""

_DATA_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.(json|jsonl|txt|model|jinja|vocab|bpe|tiktoken)")


@final
@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that a service holds: what to write in `LanguageModel(name, remote=…)`, and how large it is."""

    name: str
    class_name: str
    bytes: int
    layers: int

    def __str__(self) -> str:
        size = f", {self.bytes / 2**30:.1f} GiB" if self.bytes else ""
        layers = f", {self.layers} layers" if self.layers else ""
        return f"{self.name} ({self.class_name}{layers}{size})"


def served_models(remote: bool | str = True) -> list[ServedModel]:
    """The models of the service at an address, or of the one that is known here."""
    return listed(connect(remote).connection)


def listed(connection: Connection) -> list[ServedModel]:
    """The models of a service."""
    url, found = connection.url, []
    answer = connection.ask("GET", "/v1/models", "list of models")
    for each in Fields(answer.json(), url, "a list of models").array("models"):
        model = Fields(each, url, "a model")
        name, class_name = (shown(model.text(field), 200) for field in ("name", "class"))
        found.append(ServedModel(name, class_name, model.number("bytes", 0), model.number("layers", 0)))
    return found


@final
class ServedCheckpoint:
    """A model whose weights are at a service: the same to a `LanguageModel` as one whose weights are in files, but that
    they never come here."""

    def __init__(self, name: str, remote: bool | str) -> None:
        self.name = name
        self._connection = connect(remote).connection

    def __str__(self) -> str:
        return f"{self.name} at {self.host}"

    @property
    def host(self) -> str:
        """The address of the service."""
        return self._connection.url

    def empty(self) -> nn.Module:
        """The model without its weights, on the meta device, of the modules that the service has."""
        card = self._ask("", "a model")
        config, class_name = card.object("config"), card.text("class")
        with _explained(f"{self}: the model cannot be made of its configuration"), _bounded():
            model = Checkpoint(self.name, dtype=_dtype(card), options={"config": _config(config, self.host)}).empty()
        if type(model).__name__ != class_name:
            self._differs(f"its class is {shown(class_name, 100)} there, and {type(model).__name__} here", config)
        self._compare(model, config)
        return model

    def load(self) -> NoReturn:
        """Refuses: the weights stay where they are."""
        raise ModelError(
            f"this needs the weights of {self.name} here, and they are at {self.host}\n"
            "  way out: do it inside a trace, which runs there; or load the model here: "
            f"`LanguageModel({self.name!r})`"
        )

    def tokenizer(self) -> Any:
        """The tokenizer, made of the data files that the service sends."""
        way_out = "give one as `tokenizer=`, or token ids as input"
        try:
            files = self._ask("/tokenizer", "the files of a tokenizer").object("files")
        except NotThereError as error:
            raise ModelError(f"{self} comes without a tokenizer; {way_out}") from error
        with tempfile.TemporaryDirectory() as folder, _explained(f"{self}: its tokenizer cannot be used", way_out):
            for name, content in _data_files(files, self.host).items():
                (Path(folder) / name).write_bytes(content)
            tokenizer = Checkpoint(folder, options={"local_files_only": True, "trust_remote_code": False}).tokenizer()
            tokenizer.name_or_path = self.name
        return tokenizer

    def _ask(self, part: str, what: str) -> Fields:
        asked = f"model {self.name}" if not part else f"{part[1:]} of {self.name}"
        answer = self._connection.ask("GET", f"/v1/models/{quote(self.name)}{part}", asked)
        return Fields(answer.json(), self.host, what)

    def _compare(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        """Refuses a model whose modules are not those of the service: an experiment would mean something else there."""
        here = {}
        for path, each in model.named_modules(remove_duplicate=False):
            shapes = {name: list(held.shape) for name, held in each.named_parameters(recurse=False)}
            here[path] = _described(type(each).__name__, shapes)
        there = {}
        for told in self._ask("/modules", "the modules of a model").array("modules"):
            module = Fields(told, self.host, "a module")
            there[module.text("path")] = _described(module.text("class"), module.object("parameters"))
        for path in [*here, *there]:
            if here.get(path) != there.get(path):
                kinds = f"{there.get(path, 'missing')} there and {here.get(path, 'missing')} here"
                self._differs(f"its module `{shown(path, 200)}` is {shown(kinds, 500)}", config)

    def _differs(self, how: str, config: Mapping[str, Any]) -> NoReturn:
        import transformers

        raise ModelError(
            f"{self} is not the model that transformers {transformers.__version__} makes of its configuration: {how}\n"
            f"  way out: use the release that the service has ({shown(config.get('transformers_version'), 40)})"
        )


def _described(name: str, parameters: Mapping[str, Any]) -> str:
    """A module as it is told from others: `Linear(weight: [1007, 128])`."""
    return f"{name}({', '.join(f'{part}: {shape}' for part, shape in parameters.items())})"


def _dtype(card: Fields) -> Any:
    """The dtype of the model's weights."""
    from nnsight_compiler.files.tensors import read_dtype

    name = card.text("dtype", None)
    return None if name is None else read_dtype(name, "dtype")


def _config(data: Mapping[str, Any], url: str) -> Any:
    """The configuration that data describe, of a class that transformers has."""
    from transformers import AutoConfig

    _check_numbers(data, url)
    plain = {name: value for name, value in data.items() if name not in ("auto_map", "model_type")}
    return AutoConfig.for_model(str(data.get("model_type")), **plain)


def _check_numbers(data: object, url: str) -> None:
    if isinstance(data, dict):
        for value in data.values():
            _check_numbers(value, url)
    elif isinstance(data, list):
        for value in data:
            _check_numbers(value, url)
    elif type(data) is int and abs(data) >= MAX_NUMBER:
        raise AnswerError(f"{url} sends a configuration with the number {shown(data, 40)}, which is none of a model")


@contextmanager
def _bounded() -> Iterator[None]:
    """Ends the making of a model, in this thread, which has more modules than any model has."""
    thread, made = threading.get_ident(), 0

    def count(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > MAX_MODULES:
            raise ModelError(f"it has more than {MAX_MODULES} modules")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _data_files(files: Mapping[str, Any], url: str) -> dict[str, bytes]:
    """The files of a tokenizer that hold data; of those that hold code, and of what names code, nothing is kept."""
    found = {}
    for name, text in files.items():
        if not _DATA_FILE.fullmatch(name):
            continue
        if type(text) is not str:
            raise AnswerError(f"{url} sends the file {shown(name, 100)} as something that is no text")
        try:
            content = base64.b64decode(text, validate=True)
            if name == "tokenizer_config.json":
                config = json.loads(content)
                config.pop("auto_map", None)
                content = json.dumps(config).encode()
        except (binascii.Error, ValueError, AttributeError, RecursionError):
            raise AnswerError(f"{url} sends a file {shown(name, 100)} that cannot be read") from None
        found[name] = content
    return found


@contextmanager
def _explained(what: str, way_out: str = "ask whoever runs the service") -> Iterator[None]:
    """Turns whatever transformers raises about what a service sent into one line; the error itself is its cause."""
    try:
        yield
    except (ModelError, AnswerError) as error:
        cause = error.__cause__ or error
        reason = " ".join(shown(cause, 300).split())
        raise ModelError(f"{what}: {reason}; {way_out}") from error
    except Exception as error:  # each class of transformers raises its own
        reason = " ".join(shown(error, 300).split()) or "no reason given"
        raise ModelError(f"{what}: {type(error).__name__}: {reason}; {way_out}") from error
