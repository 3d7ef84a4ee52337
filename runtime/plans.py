"""From a placed program to functions: one for the experiment itself, and one for each site that it touches.

The functions bear the user's file name and lines.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any, final

from nnsight_compiler.ir.ops import (
    At,
    AtGradient,
    Backward,
    Call,
    Grad,
    Parameter,
    Read,
    Require,
    SetItem,
    Stop,
    Write,
)
from nnsight_compiler.ir.ops import Forward as ForwardOp
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, definitions, used, walk
from nnsight_compiler.ir.values import Module, Value
from nnsight_compiler.passes.memory import Memory
from nnsight_compiler.passes.origins import Origins
from nnsight_compiler.passes.pauses import pauses
from nnsight_compiler.passes.share_prefixes import replayed_paths, written_pieces
from nnsight_compiler.runtime import gradients
from nnsight_compiler.runtime.batching import Batcher
from nnsight_compiler.runtime.budget import Needs
from nnsight_compiler.runtime.divided_sites import Divided
from nnsight_compiler.runtime.forwards import Forward
from nnsight_compiler.runtime.functions import link
from nnsight_compiler.runtime.generation import Asked
from nnsight_compiler.runtime.hooks import SitePlan
from nnsight_compiler.runtime.invokes import Invokes
from nnsight_compiler.runtime.kept import footprints
from nnsight_compiler.runtime.model_statements import ModelStatements
from nnsight_compiler.runtime.observation import Observation
from nnsight_compiler.runtime.placed import (
    counted_from_the_end,
    invoked,
    named_weights,
    placed,
    ranges,
    wanted_steps,
    wants_gradients,
)
from nnsight_compiler.runtime.placed_statements import Axes, Stages
from nnsight_compiler.runtime.scanning import scanning
from nnsight_compiler.runtime.skipping import Left
from nnsight_compiler.runtime.stopping import Later
from nnsight_compiler.runtime.together import Together
from nnsight_compiler.runtime.trees import load, locate


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled program: `run` takes the arguments in the order of the program's parameters.

    source: the generated functions, as text.
    forwards: the plan of each forward, in the order of the program.
    """

    program: Program
    run: FunctionType
    source: str
    forwards: tuple[Forward, ...]


def plan(
    program: Program,
    globals_: dict[str, Any],
    closure: Mapping[str, CellType] | None,
    stages: Stages,
    axes: Axes,
    seen: Mapping[str, Observation],
    budget: int | None = None,
    padding: bool = False,
) -> Plan:
    """Generates the functions of a placed program.

    Args:
        seen: how the model of each forward runs, by its result's name.
        budget, padding: as `Batcher` takes them.
    """
    batcher = Batcher(axes.found, axes.concatenated, axes.confirm, Needs(axes.measured), budget, padding)
    return _Generator(program, stages, axes, seen, Together(batcher)).plan(globals_, closure)


class _Generator(ModelStatements):
    """Generates the functions of one program: those at its sites first, then the one that runs the forwards."""

    def plan(self, globals_: dict[str, Any], closure: Mapping[str, CellType] | None) -> Plan:
        program = self.program
        forwards = [op for op in walk(program.body) if isinstance(op, ForwardOp)]
        origins = Origins(program)
        pieces = [(piece, self._site(None, at)) for at, piece in self._pieces(origins)]
        sites = [(op, at, self._site(op, at)) for op in forwards for at in placed(op)]
        made = [*(each for _, each in pieces), *(each for _, _, each in sites)]
        functions = link(self, made, globals_, closure, program.span) if made else []
        for (piece, _), each in zip(pieces, functions, strict=False):
            piece.function = each
        functions = functions[len(pieces) :]
        plans: dict[int, list[SitePlan]] = {id(op): [] for op in forwards}
        for (op, at, _), each in zip(sites, functions, strict=True):
            plans[id(op)].append(self._site_plan(op, at, each))
        named = named_weights(program, origins)
        left = footprints(program)
        for op in forwards:
            foot = left.get(op.result.name)
            wanted = next((each.span for each in walk(op.body) if wants_gradients(each)), None)
            copies = wanted is not None or any(map(origins.writes_tensors, walk(op.body)))
            called = (each.function for each in walk(op.body) if isinstance(each, Call))
            own = frozenset(callee.path for callee in called if isinstance(callee, Module))
            generates = op.method == "generate"
            found = plans[id(op)]
            self.forwards[id(op)] = Forward(
                sites=tuple(site for site in found if site.port != "result"),
                stops=op.stops,
                copies=copies,
                brings=self._brings(op),
                span=op.span,
                own=own,
                wanted=wanted,
                named=named,
                invokes=self._invokes(op),
                results=tuple(site for site in found if site.port == "result"),
                replays=self._replays(op),
                prompts="" if self.prompts is None else self.names[self.prompts],
                generation=Asked(self.names[self.step], wanted_steps(op)) if generates else None,
                keeps=foot.keeps if foot else (),
                strand=foot.strand if foot else (),
                changes=foot.changes if foot else (),
                made=self._slots(foot.made if foot else ()),
                repeatable=foot is not None and foot.repeatable,
                events=self.seen[op.result.name].events if foot else (),
            )
        driver = self._driver(bool(made or self.crossing) or any(op.method == "generate" for op in forwards))
        (run,) = link(self, [driver], globals_, closure, program.span)
        if any(op.method == "scan" for op in forwards):
            run = scanning(run, program.span)
        source = "\n\n\n".join(map(ast.unparse, (*made, driver)))
        return Plan(program, run, source, tuple(self.forwards.values()))

    def _replays(self, op: ForwardOp) -> dict[str, bool]:
        """The modules that a forward replays, and whether what each gives may be written to."""
        if not isinstance(op.base, Value):
            return {}
        self.shares.setdefault(op.base.name, op.result.name)
        seen = self.seen[op.result.name]
        written = written_pieces(op, seen, Memory.of(self.program, copies=True))
        return {path: not written.isdisjoint(seen.pieces(path, "output")) for path in replayed_paths(op)}

    def _site_plan(self, op: ForwardOp, at: At, function: FunctionType) -> SitePlan:
        path, call = at.module.path, at.call
        left = Left.of(self.seen[op.result.name], path, call or 0) if at.port == "skip" else None
        later: tuple[Later, ...] = ()
        if any(isinstance(each, Stop) for each in walk(op.body)):
            made = [(value, each.span) for each in walk(at.body) for value in defined(each)]
            later = tuple(
                Later(self.names[value], value.name.partition(".")[0], span)
                for value, span in made
                if value.name in self.crossing
            )
        required = tuple(dict.fromkeys(each.leaf for each in walk(at.body) if isinstance(each, Require)))
        accesses = [each for each in walk(at.body) if isinstance(each, (Read, Write))]
        first = at.port == "input" and all(each.port == "input" for each in accesses)
        calls, steps = counted_from_the_end(at), ranges(at)
        looks = bool(accesses) or at.port not in ("input", "output")
        return SitePlan(path, at.port, call, function, at.span, calls, steps, left, later, required, first, looks)

    def _driver(self, has_state: bool) -> ast.FunctionDef:
        program = self.program
        self.has_state = has_state
        parameters = [Parameter(parameter.value) for parameter in program.parameters]
        name = self.names.fresh(program.name)
        driver = self.define(name, program.name, parameters, program.body, program.span)
        prologue: list[ast.stmt] = []
        if has_state:
            held = (*self.crossing.values(), self.step, *([] if self.prompts is None else [self.prompts]))
            slots = tuple(dict.fromkeys(self.names[value] for value in held))
            # Python changes slots' names that begin with two underscores, unless the class is named by them alone.
            state = type("_", (), {"__slots__": slots, "__doc__": "The values of one call that sites share."})
            made = ast.Call(func=self.constant("State", state), args=[], keywords=[])
            prologue.append(ast.Assign(targets=[ast.Name(self.names[self.state], ast.Store())], value=made))
            if self.prompts is not None:
                slot = ast.Attribute(load(self.names[self.state]), self.names[self.prompts], ast.Store())
                prologue.append(ast.Assign(targets=[slot], value=ast.Dict(keys=[], values=[])))
        for parameter in program.parameters:
            if parameter.value.name in self.crossing:
                given = load(self.names[parameter.value])
                prologue.append(ast.Assign(targets=[self.target(parameter.value)], value=given))
        driver.body[:0] = [locate(each, program.span) for each in prologue]
        return driver

    def _brings(self, op: ForwardOp) -> tuple[str, ...]:
        """What the sites of a forward take from outside of it."""
        inside = {value.name for value in definitions(op.body)}
        taken = (value for part in walk(op.body) for value in used(part))
        return tuple(
            dict.fromkeys(
                self.names[value] for value in taken if value.name not in inside and value.name in self.crossing
            )
        )

    def _invokes(self, op: ForwardOp) -> Invokes | None:
        """The invokes that bring the input of a forward."""
        results = [invoke.result for invoke in invoked(op)]
        if not results:
            return None
        shares = tuple(self.names[value] if value.name in self.crossing else "" for value in results)
        divided = tuple(self.shared.get(id(op), ()))
        axes = self.axes.found if id(op) in self.later else None
        return Invokes(op.span, shares, divided, self.axes.confirm, axes)

    def _pieces(self, origins: Origins) -> Iterator[tuple[AtGradient, gradients.Piece]]:
        """The parts of all backward passes, each with its place in the plan of its pass."""
        changes = tuple(
            op.span
            for op in walk(self.program.body)
            if origins.writes_tensors(op) and not isinstance(op, (AtGradient, Backward, At, ForwardOp))
        )
        for op in walk(self.program.body):
            if not isinstance(op, Backward):
                continue
            parts = [part for part in op.body.ops if isinstance(part, AtGradient)]
            makers = {value.name: number for number, part in enumerate(parts) for value in definitions(part.body)}
            pieces = []
            for number, part in enumerate(parts):
                inside = list(walk(part.body))
                homes = {makers[value.name] for each in inside for value in used(each) if value.name in makers}
                writes = any(not isinstance(each, Grad) for each in inside)
                pieces.append(gradients.Piece(part.span, writes, tuple(sorted(homes - {number}))))
                yield part, pieces[-1]
            named = named_weights(self.program, origins)
            self.backwards[id(op)] = gradients.Backward(op.span, tuple(pieces), changes, named)

    def _site(self, op: ForwardOp | None, at: At | AtGradient) -> ast.FunctionDef:
        """The function at a site of a forward, or at the arrival of a gradient."""
        self.in_site = True
        self.divided = False
        if isinstance(at, At):
            name = self.names.fresh(f"at.{at.module.path}.{at.port}" if at.module.path else f"at.{at.port}")
            self.divided = at.port != "result" and any(
                isinstance(each, (Read, Write)) and each.rows is not None for each in walk(at.body)
            )
            if not self.divided and not any(
                isinstance(each, (Write, SetItem)) or pauses(each, self.pausing) for each in walk(at.body)
            ):
                self._read_directly(at)
        else:
            name = self.names.fresh("at.gradient")
        parameters = (Parameter(self.value), Parameter(self.state))
        made = self.define(name, self.program.name, parameters, at.body, at.span)
        if self.divided:
            assert op is not None
            assert isinstance(at, At)
            axes = self._site_axes(op, at)
            divided = ast.Call(func=self.constant("Divided", Divided), args=[self._value(), axes], keywords=[])
            made.body.insert(0, locate(ast.Assign(targets=[self._value(ast.Store())], value=divided), at.span))
        result = self._of_value("whole", []) if self.divided else self._value()
        made.body.append(locate(ast.Return(value=result), at.span))
        self.in_site = self.divided = False
        return made

    def _site_axes(self, op: ForwardOp, at: At) -> ast.expr:
        self.shared.setdefault(id(op), []).append((at.module.path, at.port, at.call or 0))
        known = self.axes.known(op, at)
        if known is not None:
            return self.constant("axes", known)
        self.later.add(id(op))
        rows = next(each.rows for each in walk(at.body) if isinstance(each, (Read, Write)) and each.rows is not None)
        asked = ast.Attribute(value=self.operand(rows, at.span), attr="axes", ctx=ast.Load())
        place: list[ast.expr] = [ast.Constant(part) for part in (at.module.path, at.port, at.call or 0)]
        return ast.Call(func=asked, args=place, keywords=[])

    def _read_directly(self, at: At) -> None:
        """Has the reads of a site that is not written stand for its value, without a variable of their own."""
        for op in walk(at.body):
            plain = isinstance(op, Read) and op.port != "input" and not (op.port == "result" and op.rows is not None)
            if plain and isinstance(op, Read) and op.result.name not in self.crossing:
                self.names.give(op.result, self.names[self.value])
                self.direct.add(op.result.name)
