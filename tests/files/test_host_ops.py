"""Host ops make a file local-only: it says which lines, and runs them only when it is told to."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

from nnsight_compiler import Experiment, FileError, LocalOnlyWarning, intervene


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that can be imported, whose function has no source that a file could hold."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "some_library.py").write_text(
        "touched = []\n\n\ndef count(x):\n    touched.append(x)\n    return len(touched)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    yield "some_library"
    sys.modules.pop("some_library", None)


def test_a_function_of_a_library_is_named_with_its_line(library: str, tmp_path: Path) -> None:
    import some_library

    @intervene
    def use(x):
        first = some_library.count(x)
        return first + some_library.count(x)

    path = tmp_path / "use.safetensors"
    with pytest.warns(LocalOnlyWarning) as caught:
        saved = use.save(path)
    line = use._function.__code__.co_firstlineno + 2
    places = [f"{__file__}:{line}:17: some_library.count", f"{__file__}:{line + 1}:24: some_library.count"]
    assert [str(op) for op in saved.host_ops] == places
    assert all(place in str(caught[0].message) for place in places)
    assert "\nlocal-only, since it calls what is not in the table of known calls:\n" in str(saved)

    del sys.modules["some_library"]
    loaded = Experiment.load(path)
    assert [str(op) for op in loaded.host_ops] == places
    for refused in (loaded, loaded.lower, loaded.compile):
        with pytest.raises(FileError) as refusal:
            refused(1)
        assert f"{places[0]}: it is not in the table of known calls" in str(refusal.value)
        assert f"{' ' * 12}first = some_library.count(x)\n{' ' * 20}^^^^^^^^^^^^^^^^^^^^^\n" in str(refusal.value)
        assert "way out: if you trust who wrote the file: Experiment.load(path, allow_host_calls=True)" in str(
            refusal.value
        )
    assert "some_library" not in sys.modules

    allowed = Experiment.load(path, allow_host_calls=True)
    assert "some_library" not in sys.modules
    assert allowed(5) == 3
    assert sys.modules["some_library"].touched == [5, 5]


HOST = {
    "a name of a library": ("from some_library import count\ndef use(x):\n    return count(x)", "some_library.count"),
    "an import in the body": (
        "def use(x):\n    import some_library\n    return some_library.count(x)",
        "the import of some_library",
    ),
    "an import of a name": (
        "def use(x):\n    from os.path import join\n    return join('a', x)",
        "the import of os.path.join",
    ),
    "a builtin": ("def use(x):\n    return open(x)", "builtins.open"),
    "evaluation": ("def use(x):\n    return eval(x)", "builtins.eval"),
    "a part of torch": ("import torch\ndef use(x):\n    return torch.load(x)", "torch.load"),
    "a library as a value": ("import torch\ndef use(x):\n    return getattr(torch, x)", "torch as a value"),
    "an attribute by a computed name": (
        "def use(x):\n    return getattr(x, 'a' + x)",
        "getattr with a name that only the run can give",
    ),
    "a class made here": ("def use(x):\n    return type('A', (), {})", "type, making a class"),
    "a change of a library": ("import torch\ndef use(x):\n    torch.relu = x", "torch.relu, which is changed"),
    "in a helper": (
        "import os\ndef helper(x):\n    return os.getcwd()\ndef use(x):\n    return helper(x)",
        "os.getcwd",
    ),
    "in a closure": ("import os\ndef use(x):\n    return (lambda: os.getcwd())()", "os.getcwd"),
    "in a module": (
        "import os\nfrom torch import nn\nclass M(nn.Module):\n    def forward(self, x):\n        return os.getcwd()\n"
        "m = M()\ndef use(x):\n    return m(x)",
        "os.getcwd",
    ),
    "a method that is not known": ("def use(x):\n    return (x + 1).tofile('a')", "the method `.tofile(…)`"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOST)
def test_each_kind_of_host_op(library: str, written, tmp_path: Path, name: str) -> None:
    text, what = HOST[name]
    experiment = intervene(written(text)["use"])
    path = tmp_path / "use.safetensors"
    with pytest.warns(LocalOnlyWarning):
        saved = experiment.save(path)
    assert what in [op.name for op in saved.host_ops]
    with pytest.raises(FileError, match="this file makes calls that are not admitted"):
        Experiment.load(path)("x")


KNOWN = """
import math
import random
import time

import torch
from torch import nn

probe = nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def use(x, hook, seen=()):
    print("drawing", f"{time.perf_counter():.0f}"[:0])
    random.seed(0)
    torch.manual_seed(0)
    layer = random.choice([1, 2, 3])
    parts = [probe(x), torch.randn(2), *(part for part in seen)]
    for index, (part, scale) in enumerate(zip(parts, (1, 2))):
        hook(index)
        parts[index] = part.softmax(-1) * scale / math.sqrt(2)
    best = max(parts, key=lambda part: float(part.detach().sum()))
    text = str(ValueError("no"))
    return layer, best, text.upper(), isinstance(x, torch.Tensor), sorted({"b": 1, "a": 2}.items())
"""


def test_known_calls_and_what_the_caller_gives_are_no_host_ops(written, through, capsys) -> None:
    scope = written(KNOWN)
    x = torch.tensor([1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = through(scope["use"])
    assert loaded.host_ops == ()
    given: list[int] = []
    found, expected = loaded(x, given.append), scope["use"](x, lambda _: None)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
    assert found[2:] == expected[2:]
    assert given == [0, 1]
    assert capsys.readouterr().out == "drawing \n" * 2


DYNAMIC = "a function that only the run can give"
LATE = {
    "a save that is not ours": ("model.config.save('x')", "the method `.save(…)`"),
    "another object of its class": ("type(model.config)('x')", "the method `.type(…)(…)`"),
    "in a function that a list holds": ("held[0](model.config, 'x')", "the method `.to_json_file(…)`"),
    "in a function that is a default": ("defaulted(model.config, 'x')", "the method `.to_json_file(…)`"),
    "a method of the model": ("model.save_pretrained('x')", "the method `.save_pretrained(…)`"),
    "a method of what the model holds": ("model.config.to_json_file('x')", "the method `.to_json_file(…)`"),
    "one that goes through a list": ("[model.config.to_json_file][0]('x')", "the method `.to_json_file(…)`"),
    "one that a list hides": (
        "[[model.config.to_json_file], 0][mark(1) or 0][0]('x')",
        DYNAMIC,
    ),
    "one that goes through a helper": ("call(model.config.to_json_file, 'x')", DYNAMIC),
    "one that a sort calls": ("sorted(['x'], key=model.config.to_json_file)", DYNAMIC),
}


@pytest.mark.parametrize("name", LATE)
def test_what_only_the_model_shows_is_refused_before_anything_runs(
    written, through, tiny, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, what = LATE[name]
    text = (
        "def call(f, x):\n    return f(x)\ndef write(held, x):\n    return held.to_json_file(x)\nheld = [write]\n"
        "def defaulted(held, x, f=write):\n    return f(held, x)\n"
        f"def use(model, mark):\n    mark(1)\n    return {call}\n"
    )
    monkeypatch.chdir(tmp_path)
    marks: list[int] = []
    loaded = through(written(text)["use"])
    with pytest.raises(FileError) as caught:
        loaded(tiny, marks.append)
    assert f": {what}: it is not in the table of known calls" in str(caught.value)
    assert marks == []
    assert not (tmp_path / "x").exists()


def test_modules_of_the_model_are_no_host_ops(through, tiny) -> None:
    def lens(model, prompt):
        with model.trace(prompt):
            found = [model.lm_head(model.ln_final(layer.output[0, -1])) for layer in list(model.layers)]
        return [int(each.argmax()) for each in found]

    loaded = through(lens)
    assert loaded.host_ops == ()
    assert loaded(tiny, "The city of") == intervene(lens)(tiny, "The city of")


def test_values_that_are_no_modules_own_are_no_host_ops(through, tiny) -> None:
    def use(model, x, layer):
        with model.trace(x):
            model.layers[layer].resid_post[:, -1] *= 2
            model.layers[layer].resid_pre = model.layers[layer].resid_pre * 2
            model.layers[layer].attn.z[:, :, 0] = 0
            logits = model.output.logits
        return logits

    loaded = through(use)
    assert loaded.host_ops == ()
    assert torch.equal(loaded(tiny, "The city of", 1), intervene(use)(tiny, "The city of", 1))
