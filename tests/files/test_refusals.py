"""What has no form in a file is refused when saving, with the name, the line, the reason and a way out."""

from __future__ import annotations

import functools
import io
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from nnsight_compiler import CompileError, Experiment, FileError, LanguageModel, NNsight, intervene

Point = namedtuple("Point", "x y")
WEIGHT = torch.ones(2, requires_grad=True)


class Settings:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 2

    def method(self):
        return self.scale


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


def makers():
    """Functions that cannot be imported by a name, so that no host op stands for them."""

    @decorated
    def helper(x):
        return x

    def generator():
        yield 1

    return helper, generator


helper, generator = makers()
looped: list[object] = [1]
looped.append(looped)

PASS_IT = "  way out: pass it to the experiment as an argument, which may be anything"
PLAIN = "  way out: make it a plain tensor first: `.detach().clone()`"
REFUSED = {
    "an open file": (
        io.StringIO(),
        "`value`: it is an object of class `StringIO`, and a file holds tensors, numbers, strings, tuples, lists,"
        " dicts, sets, torch modules, functions, and objects of classes that are plain",
        PASS_IT,
    ),
    "an object": (
        Settings(),
        "`value`: its class `Settings` defines `__slots__`, which a file cannot hold",
        "  way out: write it without `__slots__`: a class may define `__init__`, `__call__`, `__contains__`,"
        " `__getitem__`, `__iter__`, `__len__` and methods with other names",
    ),
    "deep inside": (
        {"scale": [1, Settings()]},
        "`value`['scale'][1]: its class `Settings` defines `__slots__`",
        "write it without",
    ),
    "a namedtuple": (
        Point(1, 2),
        "`value`: its class `Point` inherits from `builtins.tuple`",
        "  way out: use one that inherits from nothing",
    ),
    "a method of an object": (
        Settings().method,
        "`value`: it is the function `Settings.method`, whose source cannot be taken into a file",
        PASS_IT,
    ),
    "a partial": (functools.partial(max, 1), "`value`: it is an object of class `partial`", PASS_IT),
    "a lambda from nowhere": (
        eval("lambda x: x"),
        "`value` cannot be put into a file: the source of the function <lambda> cannot be found",
        PASS_IT,
    ),
    "a decorated helper": (
        helper,
        "`value`: `helper` is wrapped by another decorator, which a file cannot hold",
        "  way out: take the decorator off, or put what it does into the function",
    ),
    "a helper that cannot be lowered": (
        generator,
        "`value` cannot be compiled, so that no file can hold it",
        "generator",
    ),
    "a list in itself": (looped, "`value`[1]: it contains itself", "  way out: take it apart"),
    "an attached tensor": (
        WEIGHT * 2,
        "`value`: the tensor cannot be stored: it was computed from tensors that require gradients, and is attached to"
        " them",
        PLAIN,
    ),
    "a sparse tensor": (
        torch.ones(2, 2).to_sparse(),
        "`value`: the tensor cannot be stored: it is sparse or quantized",
        PLAIN,
    ),
    "a tensor without values": (
        torch.empty(2, device="meta"),
        "`value`: the tensor cannot be stored: its weights are not loaded",
        PLAIN,
    ),
    "a conjugate": (
        torch.ones(2, dtype=torch.complex64).conj(),
        "`value`: the tensor cannot be stored: it is a conjugate view of another",
        PLAIN,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_without_a_form(tmp_path: Path, name: str) -> None:
    value, reason, way_out = REFUSED[name]

    @intervene
    def use(x):
        return x, value

    with pytest.raises(FileError) as caught:
        use.save(tmp_path / "no.safetensors")
    text = str(caught.value)
    line = use._function.__code__.co_firstlineno + 2
    assert text.startswith(f"use cannot be put into a file:\n{__file__}:{line}:19: `value`")
    assert reason in text
    assert way_out in text
    assert f"{' ' * 12}return x, value\n{' ' * 22}^^^^^" in text
    assert not list(tmp_path.iterdir())


def test_every_reason_at_once(tmp_path: Path) -> None:
    one, two = Settings(), io.StringIO()

    @intervene
    def use(x=Point(1, 2)):  # noqa: B008
        return one, two, missing  # noqa: F821

    with pytest.raises(FileError) as caught:
        use.save(tmp_path / "no.safetensors")
    reasons = [each.reason for each in caught.value.diagnostics]
    assert len(reasons) == 4
    assert reasons[0].startswith("`one`: its class `Settings` defines `__slots__`")
    assert reasons[1].startswith("`two`: it is an object")
    assert reasons[2] == "`missing` has no value, so that no file can hold it"
    assert reasons[3].startswith("`use` (the default of `x`): its class `Point` inherits from")


def test_a_class_of_the_users(written, tmp_path: Path) -> None:
    scope = written("class Result:\n    pass\ndef use(x):\n    return Result()\n", "__main__.py")
    with pytest.raises(
        FileError, match="`Result`: it is the class `Result`, and a file holds no code but that of functions and of"
    ):
        intervene(scope["use"]).save(tmp_path / "no.safetensors")


def test_two_models(tmp_path: Path, tiny: LanguageModel) -> None:
    other = NNsight(torch.nn.Linear(1, 1))

    @intervene
    def both(prompt):
        with tiny.trace(prompt):
            hidden = tiny.layers[0].output
        return hidden, other

    with pytest.raises(FileError, match="`other`: it is a second model, and a file is bound to one when it is loaded"):
        both.save(tmp_path / "no.safetensors")


def test_an_experiment_that_calls_another(tmp_path: Path) -> None:
    @intervene
    def inner(x):
        return x

    @intervene
    def outer(x):
        return inner(x)

    with pytest.raises(FileError, match="`inner`: it is another experiment, which has a file of its own"):
        outer.save(tmp_path / "no.safetensors")


def test_a_function_that_cannot_be_compiled(tmp_path: Path) -> None:
    @intervene
    def use(x):
        match x:
            case 1:
                return 2

    with pytest.raises(CompileError, match="the match statement is not supported"):
        use.save(tmp_path / "no.safetensors")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    @intervene
    def use(x):
        return x

    with pytest.raises(FileError, match=r"use\.safetensors cannot be written: there is no folder \S+/no/such/folder$"):
        use.save(tmp_path / "no/such/folder/use.safetensors")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "use.safetensors"
    vector = torch.ones(3)

    @intervene
    def use(x):
        return x + vector

    use.save(path)
    before = path.read_bytes()

    def fails(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nnsight_compiler.files.format.save_file", fails)
    with pytest.raises(FileError, match=r"use\.safetensors cannot be written: No space left on device"):
        use.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_that_was_not_given(through, tiny: LanguageModel) -> None:
    model = tiny

    def outside(prompt):
        with model.trace(prompt):
            hidden = model.layers[1].output
        return hidden

    loaded: Experiment = through(outside)
    with pytest.raises(FileError, match="`model` is the model, which this file was saved without") as caught:
        loaded("a b")
    assert "Experiment.load(path, model=model)" in str(caught.value)


def test_what_is_no_experiment_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(FileError, match="is a safetensors file, but holds no experiment"):
        Experiment.load(path)
    path.write_text("print('hello')")
    with pytest.raises(FileError, match="is no safetensors file, or it is cut off"):
        Experiment.load(path)
    with pytest.raises(FileError, match="cannot be read: No such file or directory"):
        Experiment.load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileError, match="cannot be read: Is a directory"):
        Experiment.load(tmp_path)
