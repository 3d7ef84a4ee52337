"""Programs that someone wrote to get out of a file: into other objects, other modules, the disk. Each is refused.

They are written as Python, and put into documents as the front end lowers them, without the checks of saving.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_compiler import Experiment, FileError, intervene
from nnsight_compiler.files.loading import experiment_from
from nnsight_compiler.files.saving import experiment_document
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.serial import to_json


@intervene
def harmless(x):
    return x


def document_of(text: str, globals_: dict[str, Any] | None = None) -> dict[str, Any]:
    """A document whose program is this, in the text form of the IR, and whose globals are these nodes."""
    document, _ = experiment_document(harmless)
    document["program"] = to_json(parse_program(text))
    document["globals"] = globals_ or {}
    return json.loads(json.dumps(document))


TORCH = {"torch": {"namespace": "torch"}}
AT_LOAD = {
    "a dunder": ("%0 = attr %x.__subclasses__", {}, "no file may ask for the attribute '__subclasses__'"),
    "the classes of a class": ("%0 = attr %x.mro", {}, "no file may ask for the attribute 'mro'"),
    "the globals of a function": ("%0 = attr %x.__globals__", {}, "no file may ask for the attribute '__globals__'"),
    "the frame of a generator": ("%0 = attr %x.gi_frame", {}, "no file may ask for the attribute 'gi_frame'"),
    "the frame before it": ("%0 = attr %x.f_back", {}, "no file may ask for the attribute 'f_back'"),
    "the frame of a traceback": ("%0 = attr %x.tb_frame", {}, "no file may ask for the attribute 'tb_frame'"),
    "the hooks of a module": ("%0 = attr %x._forward_hooks", {}, "no file may ask for the attribute '_forward_hooks'"),
    "another class for an object": ("set_attr %x.__class__ = 1", {}, "no file may change the attribute '__class__'"),
    "the import function": ("%0 = global __import__", {}, "'__import__' is no name that a file may read or set"),
    "the builtins": ("%0 = global __builtins__", {}, "'__builtins__' is no name that a file may read or set"),
    "a name that is no name": ("%0 = global 'a b'", {}, "'a b' is no name that a file may read or set"),
    "an import of a dunder": ("%0 = from math import __loader__", {}, "no file may import the name '__loader__'"),
    "a module that is no name": ("%0 = import 'os; print'", {}, "is no name of a module"),
    "a target of its own": ("%0 = call %x() as builtins.len", {}, "only the compiler says which known call a call is"),
    "a module outside of the set": (
        "%0 = global os", {"os": {"namespace": "os"}}, "'os' is no module that a file may name",
    ),
    "a function outside of the set": (
        "%0 = global f", {"f": {"known": "os.system"}}, "at globals.f: 'os.system' is no known call",
    ),
    "a known call that reads files": (
        "%0 = global f", {"f": {"known": "torch.from_file"}}, "at globals.f: 'torch.from_file' is no known call",
    ),
    "a known call that is a private name": (
        "%0 = global f", {"f": {"known": "torch._C._jit_clear_class_registry"}}, "is no known call",
    ),
    "a host op deep inside a value": (
        "%0 = global f", {"f": {"tuple": [{"host": "os:system"}]}}, "this may only be what a name stands for",
    ),
    "a function that looks up attributes, in a value": (
        "%0 = global f", {"f": {"tuple": [{"known": "builtins.getattr"}]}}, "may only be what a name stands for",
    ),
    "a function that makes such functions": (
        "%0 = global f", {"f": {"known": "operator.attrgetter"}}, "'operator.attrgetter' is no known call",
    ),
    "a function that calls methods by text": (
        "%0 = global f", {"f": {"known": "operator.methodcaller"}}, "'operator.methodcaller' is no known call",
    ),
    "a host op that is no name": ("%0 = global f", {"f": {"host": "os:system('x')"}}, "is no name of something to imp"),
    "a name from nowhere": ("%0 = global nowhere", {}, "nothing in the file, and no builtin, has it"),
    "a kept value": ("%0 = keep %x", {}, "a value that is kept without a copy is only known to the compiler"),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_LOAD)
def test_refused_when_it_is_loaded(name: str) -> None:
    op, globals_, reason = AT_LOAD[name]
    document = document_of(f"experiment f(%x)\n  {op}\n  return %x\n", globals_)
    with pytest.raises(FileError) as caught:
        experiment_from(document, {})
    assert reason in str(caught.value)


DYNAMIC = "a function that only the run can give"
METHOD = "%y = %x + 1\n%f = attr %y.tofile\n"
T = "%t = global torch\n"
LOAD = "%f = attr %u.load\n%0 = call %f('x')"
WHEN_CALLED = {
    "a builtin": ("%f = global eval\n%0 = call %f('1')", "builtins.eval"),
    "a module of a module": (T + "%f = attr %t.os\n%g = attr %f.system\n%0 = call %g('true')", "torch.os.system"),
    "a module in a list": (T + "%l = list [%t]\n%u = item %l[0]\n" + LOAD, "torch as a value"),
    "a module in a cell": (T + "%c = cell t = %t\n%u = load %c as t\n" + LOAD, "torch as a value"),
    "a module as an argument": (T + "%v = global vars\n%d = call %v(%t)", "torch as a value"),
    "the insides of an object": ("%v = global vars\n%d = call %v(%x)", "builtins.vars"),
    "a dunder by getattr": ("%g = global getattr\n%d = call %g(%x, '__class__x__')", "getattr with a name"),
    "a dunder by parts": ("%g = global getattr\n%n = '__cla' + 'ss__'\n%d = call %g(%x, %n)", "getattr with a name"),
    "getattr through a list": (
        "%g = global getattr\n%l = list [%g]\n%f = item %l[0]\n%0 = call %f(%x, '__class__')", "getattr as a value",
    ),
    "getattr through a partial": (
        "%p = global partial\n%g = global getattr\n%f = call %p(%g, %x)\n%0 = call %f('__class__')",
        "getattr as a value",
    ),
    "getattr that another calls": (
        "%p = global accumulate\n%g = global getattr\n%0 = call %p(%x, %g)", "getattr as a value",
    ),
    "getattr through a condition": (
        "%g = global getattr\n%f = if %x\nthen\n  yield %g\nelse\n  yield %g\n%0 = call %f(%x, '__class__')",
        "getattr as a value",
    ),
    "type through a list": ("%g = global type\n%l = list [%g]\n%f = item %l[0]\n%0 = call %f(%x)", "type as a value"),
    "attributes that a function gets": (
        "%o = global operator\n%f = attr %o.attrgetter\n%0 = call %f('__class__')", "operator.attrgetter",
    ),
    "methods that a function calls": (
        "%o = global operator\n%f = attr %o.methodcaller\n%0 = call %f('tofile', 'a')", "operator.methodcaller",
    ),
    "attributes that a text names": (
        "%f = attr '{0.__class__}'.format\n%0 = call %f(%x)", "the method `.format(…)` of a text that only the run",
    ),
    "attributes that a text in a text names": (
        "%f = attr '{0:{0.__class__}}'.format\n%0 = call %f(%x)", "the method `.format(…)` of a text that only the run",
    ),
    "attributes that a computed text names": (
        "%t = '{0.__cla' + 'ss__}'\n%f = attr %t.format\n%0 = call %f(%x)", "the method `.format(…)` of a text that",
    ),
    "attributes that a text and a mapping name": (
        "%f = attr '{a.__class__}'.format_map\n%d = dict {'a': %x}\n%0 = call %f(%d)", "the method `.format_map(…)`",
    ),
    "the formatting of a text, through a list": (
        "%f = attr '{0.__class__}'.format\n%l = list [%f]\n%g = item %l[0]\n%0 = call %g(%x)", DYNAMIC,
    ),
    "attributes that a bar of progress names": (
        "%f = global tqdm\n%0 = call %f(%x, bar_format='{bar.__init__}')", "with a `bar_format` that only the run can",
    ),
    "a stream that is given": ("%f = global print\n%0 = call %f('a', file=%x)", "print to a stream"),
    "a stream among arguments": ("%f = global print\n%0 = call %f('a', **%x)", "print to a stream"),
    "a logger, which outlives the run": (
        "%o = global logging\n%f = attr %o.getLogger\n%0 = call %f('transformers')", "logging.getLogger",
    ),
    "a method that json calls": (METHOD + "%s = global dumps\n%0 = call %s(%y, default=%f)", DYNAMIC),
    "a method that an accumulation calls": (METHOD + "%s = global accumulate\n%0 = call %s(('a',), %f)", DYNAMIC),
    "a method that a pattern calls": (METHOD + "%s = attr %x.sub\n%0 = call %s(%f, 'a')", DYNAMIC),
    "an attribute of something": (
        "%y = %x + 1\n%l = list [%y]\n%z = item %l[0]\nset_attr %z.padding_side = 1",
        "`.padding_side` of what only the run can give, which is changed",
    ),
    "getattr with its arguments in a tuple": ("%g = global getattr\n%d = call %g(*%x)", "getattr with a name"),
    "a method by getattr": (
        "%y = %x + 1\n%g = global getattr\n%f = call %g(%y, 'tofile')\n%0 = call %f('a')",
        "the method `.tofile(…)`",
    ),
    "a method through a list": (METHOD + "%l = list [%f]\n%g = item %l[0]\n%0 = call %g('a')", DYNAMIC),
    "a method through a condition": (
        METHOD + "%g = if %x\nthen\n  yield %f\nelse\n  yield %f\n%0 = call %g('a')",
        DYNAMIC,
    ),
    "a method through a closure": (
        METHOD + "%c = closure g(%h)\n  %r = call %h('a')\n  return %r\n%0 = call %c(%f)",
        DYNAMIC,
    ),
    "a method that a sort calls": (METHOD + "%s = global sorted\n%0 = call %s(('a',), key=%f)", DYNAMIC),
    "a method that a list's sort calls": (METHOD + "%l = list ['a']\n%s = attr %l.sort\n%0 = call %s(key=%f)", DYNAMIC),
    "a method that an iterator calls": (METHOD + "%s = global iter\n%0 = call %s(%f, 1)", DYNAMIC),
    "a method in a global": (METHOD + "set_global g = %f\n%g = global g\n%0 = call %g('a')", DYNAMIC),
    "a method kept as an attribute": (METHOD + "set_attr %x.act = %f", "`.tofile`, kept as an attribute"),
    "a forward that is replaced": ("set_attr %x.forward = 1", "`.forward`, a method that is replaced"),
    "a change of torch": (T + "set_attr %t.relu = %x", "torch.relu, which is changed"),
    "a change of a class": (T + "%T = attr %t.Tensor\nset_attr %T.relu = %x", "torch.Tensor.relu, which is changed"),
    "an import": ("%o = import os\n%f = attr %o.getcwd\n%0 = call %f()", "the import of os"),
    "a relative import": ("%o = from . import os", "the import from `.`"),
    "an import of a known module's neighbour": ("%o = from math import system", "the import of math.system"),
}  # fmt: skip


@pytest.mark.parametrize("name", WHEN_CALLED)
def test_refused_before_anything_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, what = WHEN_CALLED[name]
    code = "".join(f"  {line}\n" for line in code.splitlines())
    globals_: dict[str, Any] = {
        "torch": {"namespace": "torch"}, "operator": {"namespace": "operator"}, "logging": {"namespace": "logging"},
        "partial": {"known": "functools.partial"}, "accumulate": {"known": "itertools.accumulate"},
        "dumps": {"known": "json.dumps"}, "tqdm": {"known": "tqdm.tqdm"}, "g": {"constant": "None"},
    }  # fmt: skip
    loaded = experiment_from(document_of(f"experiment f(%x)\n{code}  return %x\n", globals_), {})
    import numpy

    with pytest.raises(FileError) as caught:
        loaded(numpy.ones(2))
    assert f"{what}" in str(caught.value)
    assert "it is not in the table of known calls" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_loading_imports_and_calls_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    document = document_of(
        "experiment f(%x)\n  %0 = global trap\n  %1 = attr %0.spring\n  %2 = call %1()\n  return %2\n",
        {"trap": {"host": "trap:"}},
    )
    before = set(sys.modules)
    loaded = experiment_from(document, {})
    with pytest.raises(FileError, match=r"trap\.spring: it is not in the table of known calls"):
        loaded(1)
    assert set(sys.modules) == before
    with pytest.raises(SystemExit, match="imported"):
        experiment_from(document, {}, allow_host_calls=True)(1)


def test_a_captured_class_cannot_take_the_place_of_torchs_own_methods() -> None:
    from torch import nn

    class Own(nn.Module):
        def forward(self, x):
            return x

    module = Own()

    @intervene
    def use(x):
        return module(x)

    document, tensors = experiment_document(use)
    assert experiment_from(json.loads(json.dumps(document)), tensors)(3) == 3
    for name, reason in {
        "__call__": "'__call__' is no name of a method",
        "__getattr__": "'__getattr__' is no name of a method",
        "_forward_hooks": "'_forward_hooks' is no name of a method",
    }.items():
        changed = json.loads(json.dumps(document))
        entry = next(each for each in changed["objects"] if each["kind"] == "class")
        entry["members"][name] = entry["members"]["forward"]
        with pytest.raises(FileError, match=reason):
            experiment_from(changed, tensors)


def test_texts_are_formatted_that_only_take_their_values() -> None:
    text = "%f = attr '{0} {1[0]:{2}}'.format\n  %r = call %f(%x, (7,), '>3')\n"
    assert experiment_from(document_of(f"experiment f(%x)\n  {text}  return %r\n"), {})(5) == "5   7"


def test_a_method_takes_objects_of_its_own_class_alone(tmp_path: Path) -> None:
    """It was admitted for those, whose `tofile` is a module."""
    from torch import nn

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tofile = nn.Identity()

        def add(self, path):
            return self.tofile(path)

    module = Own()

    @intervene
    def use(x, path):
        return module.add(path)

    document, tensors = experiment_document(use)
    assert experiment_from(json.loads(json.dumps(document)), tensors)(3, "a") == "a"
    changed = json.loads(json.dumps(document))
    changed["program"] = to_json(
        parse_program(
            "experiment use(%x, %path)\n  %m = free module\n  %t = global type\n  %c = call %t(%m)\n"
            "  %f = attr %c.add\n  %r = call %f(%x, %path)\n  return %r\n"
        )
    )
    import numpy

    path = str(tmp_path / "written")
    with pytest.raises((TypeError, FileError), match=r"takes no ndarray|is not in the table of known calls"):
        experiment_from(changed, tensors)(numpy.ones(2), path)
    assert not list(tmp_path.iterdir())


def test_a_module_inside_a_module_stays_one() -> None:
    """A call of it is admitted as one of a module."""
    from torch import nn

    module = nn.Sequential()
    module.add_module("act", nn.Identity())

    @intervene
    def use(x):
        return module.act(x)

    document, tensors = experiment_document(use)
    assert experiment_from(json.loads(json.dumps(document)), tensors)(3) == 3
    for change in ("delete_attr %m.act", "set_attr %m.act = %x"):
        changed = json.loads(json.dumps(document))
        changed["program"] = to_json(
            parse_program(f"experiment use(%x)\n  %m = free module\n  {change}\n  return %x\n")
        )
        with pytest.raises(FileError, match=r"`\.act`, a method that is replaced"):
            experiment_from(changed, tensors)(3)


def test_a_tensor_cannot_reach_past_what_is_stored() -> None:
    vector = torch.ones(4)

    @intervene
    def use():
        return vector

    document, tensors = experiment_document(use)
    for change, reason in (
        ({"shape": [5]}, "the tensor reaches past the 4 elements that are stored"),
        ({"stride": [2**30]}, "the tensor reaches past the 4 elements that are stored"),
        ({"offset": 1}, "the tensor reaches past the 4 elements that are stored"),
        ({"stride": [-1]}, "expected a whole number from 0"),
        ({"stride": [1, 1]}, "the shape and the strides do not go together"),
        ({"dtype": "int64"}, "the tensor is float32, not int64"),
        ({"dtype": "load"}, "'load' is no dtype"),
        ({"data": "other"}, "the file has no tensor 'other'"),
        ({"requires_grad": 1}, "expected true or false"),
    ):
        changed = json.loads(json.dumps(document))
        changed["objects"][0].update(change)
        with pytest.raises(FileError, match=reason):
            experiment_from(changed, tensors)
    with pytest.raises(FileError, match="nothing mentions the tensor 'spare' of the file"):
        experiment_from(document, {**tensors, "spare": vector})


def test_another_version_or_format(tmp_path: Path) -> None:
    document, _ = experiment_document(harmless)
    for change, reason in (
        ({"version": 2}, "at version: this is version 2, and only 1 is known to this release"),
        ({"version": True}, "at version: this is version True, and only 1 is known"),
        ({"format": "pickle"}, "at format: expected 'nnsight-compiler-experiment'"),
        ({"more": 1}, "at the top: unknown field 'more'"),
    ):
        with pytest.raises(FileError, match=reason):
            experiment_from({**document, **change}, {})
    assert isinstance(experiment_from(document, {}), Experiment)
