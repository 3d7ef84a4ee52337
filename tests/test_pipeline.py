"""The whole way from source to generated code: every program, after every pass, is well formed and"
" reads back the same."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import random
import re
import runpy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import (
    CompileError,
    Experiment,
    IRError,
    LanguageModel,
    NNsight,
    UnusedValueWarning,
    compilation,
    intervene,
    save,
)
from nnsight_compiler.cache import Cache
from nnsight_compiler.compilation import PASSES, lower_program
from nnsight_compiler.frontend import lower_file, lower_function
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.printer import print_program
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.serial import from_json, to_json
from nnsight_compiler.ir.values import Value
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.observations import observed
from nnsight_compiler.passes.check_sites import check_sites
from nnsight_compiler.passes.check_unused_values import check_unused_values
from nnsight_compiler.passes.copy_on_save import copy_on_save
from nnsight_compiler.passes.eliminate_common_subexpressions import eliminate_common_subexpressions
from nnsight_compiler.passes.eliminate_dead_saves import eliminate_dead_saves
from nnsight_compiler.passes.fill_caches import fill_caches
from nnsight_compiler.passes.fuse_calls import fuse_calls
from nnsight_compiler.passes.hoist_forwards import hoist_forwards
from nnsight_compiler.passes.infer import infer
from nnsight_compiler.passes.manager import DEBUG_VARIABLE, PassResult
from nnsight_compiler.passes.merge_forwards import merge_forwards
from nnsight_compiler.passes.merge_straight_forwards import merge_straight_forwards
from nnsight_compiler.passes.narrow import narrow
from nnsight_compiler.passes.narrow_saves import narrow_saves
from nnsight_compiler.passes.place import place
from nnsight_compiler.passes.record_gradients import record_gradients
from nnsight_compiler.passes.remarks import Remarks
from nnsight_compiler.passes.repeat_writes import repeat_writes
from nnsight_compiler.passes.shapes import Surroundings
from nnsight_compiler.passes.share_prefixes import share_prefixes
from nnsight_compiler.passes.sites import Order
from nnsight_compiler.passes.skips import check_skips
from nnsight_compiler.passes.specialise import specialise
from nnsight_compiler.passes.stop_early import stop_early
from nnsight_compiler.passes.subject import Subject
from nnsight_compiler.passes.unite_forwards import unite_forwards
from nnsight_compiler.positions_apart import positionwise_of
from nnsight_compiler.shapes import extent_of

ROOT = Path(__file__).parent.parent
SHIPPED = [*sorted((ROOT / "examples").glob("*.py")), ROOT / "nnsight_compiler" / "demo" / "experiments.py"]
PROGRAM = re.compile(r"@intervene|\.(trace|generate|session|scan|edit)\(")
TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py") if PROGRAM.search(path.read_text(encoding="utf-8")))
"""Those in which a program may stand: to parse a file takes seconds."""
EXPERIMENTS = [path for path in SHIPPED if path.stem != "train_tiny_model"]
PAGE = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```ir\n(.*?)```", PAGE, re.DOTALL)

CLEAN, CORRUPT = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"
"""Eight tokens each, so that positions match."""

torch.set_num_threads(1)


def check(program: Program) -> None:
    """Well formed, and the same after a way through its text and its serial form."""
    verify(program)
    assert parse_program(print_program(program)) == program
    assert from_json(json.loads(json.dumps(to_json(program)))) == program


# --- before any model is known ---


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_what_is_shipped_reads_back_the_same(path: Path) -> None:
    programs = lower_file(path)
    assert bool(programs) == (path in EXPERIMENTS)
    for program in programs:
        check(program)


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_the_tests_own_experiments_read_back_the_same(path: Path) -> None:
    try:
        programs = lower_file(path)
    except CompileError as error:
        pytest.skip(f"it holds what is refused: {error.diagnostics[0].reason}")
    for program in programs:
        check(program)


# --- specialised, after every pass ---


@functools.cache
def tiny() -> LanguageModel:
    return LanguageModel("tiny")


def network() -> NNsight:
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))


ARGUMENTS: Mapping[str, Any] = {
    "prompt": CLEAN, "clean": CLEAN, "corrupt": CORRUPT, "towards": CLEAN, "away": CORRUPT, "layer": 1, "position": -1,
    "positions": (0, 2), "answer": 5, "other": 7, "vector": torch.ones(2, 128), "strength": 0.5, "unit": 3,
    "advance": lambda: None, "head": 1, "query": -1, "key": 2, "tokens": 2, "sparsity": 0.1, "layers": (0, 2),
    "prompts": [CLEAN, CORRUPT], "clean_subject": "Eiffel Tower", "corrupt_subject": "Space Needle",
}  # fmt: skip


@functools.cache
def namespace(path: Path) -> Mapping[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(path)])
        return runpy.run_path(str(path))


def experiments() -> Iterator[Any]:
    for path in EXPERIMENTS:
        for program in lower_file(path):
            if program.kind == "experiment":
                yield pytest.param(path, program.name, id=f"{path.stem}:{program.name}")


def call(experiment: Experiment) -> dict[str, Any]:
    """The arguments that an experiment is lowered with, by the names of its parameters."""
    names = [parameter.value.name for parameter in experiment.ir.parameters]
    if "x" in names:
        return {"model": network(), "x": torch.ones(1, 4), "unit": 3}
    arguments = {"model": tiny(), **{name: ARGUMENTS[name] for name in names if name != "model"}}
    if "tokens" in names:
        arguments["vector"] = torch.ones(128)
    if "sparsity" in names:
        arguments["model"] = model = LanguageModel("tiny")
        model.layers[ARGUMENTS["layer"]].sae = Autoencoder()
    return arguments


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(128, 16), nn.Linear(16, 128)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(hidden).relu())


@pytest.mark.parametrize(("path", "name"), [*experiments()])
def test_every_stage_of_every_experiment(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    experiment = namespace(path)[name]
    lowered = experiment.lower(**call(experiment))
    assert tuple(stage for stage, _ in lowered.stages) == PASSES
    before = None
    for number, (_, program) in enumerate(lowered.stages):
        if before is None or dataclasses.replace(program, passes=before.passes) != before:
            check(program)
        assert program.passes == PASSES[: number + 1]
        before = program
    check(program)
    assert lowered.stages[-1][1] == lowered.program
    source = lowered.compile().source
    assert any(isinstance(each, ast.FunctionDef) for each in ast.walk(ast.parse(source)))


def test_an_undecorated_block_goes_through_the_same_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    (program,) = (each for each in lower_file(ROOT / "examples" / "first_example.py") if each.kind == "block")
    stages: list[PassResult] = []
    names = [parameter.value.name for parameter in program.parameters]
    values = dict(zip(names, (tiny(), (CLEAN,), {}), strict=True))
    lowered = lower_program(program, values, {}, {}, stages.append)
    assert tuple(stage.name for stage in stages) == PASSES
    for stage in stages:
        check(stage.program)
    assert set(lowered.program.exports) == {"hidden_state", "output"}
    assert not lowered.unsaved
    ast.parse(Cache(program, {}, {}).get(tuple(values.values())).source)


# --- a bug in a pass ---


@intervene
def read(model, x):
    with model.trace(x):
        hidden = model[0].output
    return hidden


@pytest.mark.parametrize("name", ["eliminate_dead_saves", "eliminate_common_subexpressions", "copy_on_save"])
def test_a_pass_that_breaks_the_program_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(program: Program, **_: object) -> Program:
        body = dataclasses.replace(program.body, ops=(*program.body.ops[:-1], ops.Return(Value("nowhere"))))
        return dataclasses.replace(program, body=body)

    monkeypatch.setattr(compilation, name, breaks)
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    before = ", ".join(PASSES[: PASSES.index(name)])
    with pytest.raises(IRError, match=rf"the pass `{name}`, after {before}, broke the program: .*nowhere"):
        read.lower(network(), torch.ones(1, 4))


@pytest.mark.parametrize("name", ["specialise", "place"])
def test_a_pass_that_raises_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Program:
        raise ZeroDivisionError

    monkeypatch.setattr(compilation, name, fails)
    with pytest.raises(ZeroDivisionError) as caught:
        read.lower(network(), torch.ones(1, 4))
    assert f"in the pass `{name}`" in caught.value.__notes__[0]


# --- the page on the passes ---


@pytest.mark.parametrize("text", SNIPPETS)
def test_the_programs_of_the_page_are_well_formed(text: str) -> None:
    program = parse_program(text)
    check(program)
    squeeze = re.compile(r" +(# .*)?$", re.MULTILINE)
    assert squeeze.sub("", print_program(program)) == squeeze.sub("", text)


def section(name: str) -> str:
    return PAGE.split(f"## `{name}`\n")[1].split("\n## ")[0]


def test_the_page_has_a_section_for_each_pass_in_order() -> None:
    assert tuple(re.findall(r"^## `(\w+)`$", PAGE, re.MULTILINE)) == PASSES
    assert " → ".join(PASSES) in PAGE
    for name in PASSES:
        path = re.search(r"^In `(passes/\w+\.py)`", section(name), re.MULTILINE)
        assert path is not None, name
        assert f"\ndef {name}(" in (ROOT / path[1]).read_text(encoding="utf-8")


def order(_: ops.Forward) -> Order:
    return observed(tiny(), ((CLEAN,), {}))


SUBJECT = Subject({**ARGUMENTS, "model": tiny(), "scale": 2.0}, {"random": random}, {}, lower_function, save)
RUNS: Mapping[str, Callable[[Program], Program]] = {
    "specialise": lambda program: specialise(program, SUBJECT).program,
    "fill_caches": lambda program: fill_caches(program, order, lambda _: dict(tiny()._module.named_modules())),
    "infer": lambda program: infer(
        program, Surroundings({**ARGUMENTS, "model": tiny()}, {}, {}), lambda _: extent_of(tiny(), ((CLEAN,), {}))
    ),
    "check_sites": lambda program: check_sites(program, order),
    "check_skips": lambda program: check_skips(program, order),
    "check_unused_values": check_unused_values,
    "repeat_writes": repeat_writes,
    "eliminate_dead_saves": eliminate_dead_saves,
    "hoist_forwards": lambda program: hoist_forwards(program, Remarks(), lambda _: None, lambda _: list),
    "unite_forwards": lambda program: unite_forwards(program, Remarks(), lambda _: None),
    "eliminate_common_subexpressions": eliminate_common_subexpressions,
    "narrow": lambda program: narrow(
        narrow_saves(program, {"token": 3}, Remarks(), lambda text, value: None),
        order,
        lambda _, path: positionwise_of(tiny(), path, observed(tiny(), ((CLEAN,), {}))),
        {"token": 3},
        Remarks(),
        lambda text, value: None,
    ),
    "fuse_calls": lambda program: fuse_calls(
        program,
        lambda _, path: positionwise_of(tiny(), path, observed(tiny(), ((CLEAN,), {}))),
        {},
        Remarks(),
        lambda text, value: None,
    ),
    "record_gradients": lambda program: record_gradients(program, order),
    "place": lambda program: place(program, order),
    "copy_on_save": copy_on_save,
    "stop_early": lambda program: stop_early(program, order, Remarks(), lambda _: False),
    "merge_forwards": lambda program: merge_forwards(program, lambda _: None, lambda _, path: False, Remarks()),
    "share_prefixes": lambda program: share_prefixes(program, order, lambda _: None, Remarks()),
    "merge_straight_forwards": lambda program: merge_straight_forwards(
        program, lambda _: None, lambda *_: False, Remarks()
    ),
}


@pytest.mark.parametrize("name", [name for name in PASSES if not name.startswith("check")])
def test_the_page_shows_what_the_pass_makes(name: str) -> None:
    programs = [*map(parse_program, re.findall(r"```ir\n(.*?)```", section(name), re.DOTALL))]
    assert programs
    for before, after in zip(programs[::2], programs[1::2], strict=True):
        assert print_program(RUNS[name](before)) == print_program(after)


@pytest.mark.parametrize("name", ["check_sites", "check_skips"])
def test_the_page_shows_what_is_refused(name: str) -> None:
    (text,) = re.findall(r"```ir\n(.*?)```", section(name), re.DOTALL)
    with pytest.raises(CompileError) as caught:
        RUNS[name](parse_program(text))
    (diagnostic,) = caught.value.diagnostics
    assert f"`{diagnostic.span}: {diagnostic.reason}`" in section(name).replace("``", "`")


def test_the_page_shows_what_is_warned_of() -> None:
    (text,) = re.findall(r"```ir\n(.*?)```", section("check_unused_values"), re.DOTALL)
    program = parse_program(text)
    with pytest.warns(UnusedValueWarning, match="`acts` is made from a value of the model"):
        assert RUNS["check_unused_values"](program) is program
