"""Keeps of what leaves its site only what is used of it: what is computed from a value alone moves before the save.

    %1 = read %model@h.3 output                   %1 = read %model@h.3 output
    %h = save %1                                  %2 = item %1[:, -1]
    …                                     ──▶     %last = save %2
    %last = item %h[:, -1]                        …

So do the entries of a list or dict that the program fills, where of each the same is used:

    %1 = read %model@h.3 output                   %1 = read %model@h.3 output
    %2 = call %append(%1)                         %2 = attr %1.norm
    …                                     ──▶     %3 = call %2(dim=-1)
    for %x in %acts                               %4 = call %append(%3)
      %3 = attr %x.norm                           …
      %4 = call %3(dim=-1)                        for %4 in %acts

Legal where

- each use of the value is a reduction (`reductions.py`): an index of whole numbers and slices, or calls of torch that
  change nothing and give less, with constants and numbers that are there before the value is kept;
- nothing writes to the value, or to a part of it, once it is kept; a part that is computed anew at each use is copied
  at each, unless no one can tell;
- the reduction is sure to be used, or cannot fail because of how large the value is: no error comes where none came;
- it is under the same `with`s where it is used and where the value is kept, and no code of the program sets what
  torch's calls go by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import defined, regions, rewrite
from nnsight_compiler.ir.values import Literal, Module, Operand, Value
from nnsight_compiler.passes.certainty import Certainty, whole_loops
from nnsight_compiler.passes.containers import Container, Containers, Element, Put
from nnsight_compiler.passes.layout import Layout
from nnsight_compiler.passes.memory import SETTINGS, Memory, Outside, Roots, Weight
from nnsight_compiler.passes.parts import Rely
from nnsight_compiler.passes.reductions import Reduction, Reductions
from nnsight_compiler.passes.remarks import Remarks
from nnsight_compiler.passes.replacements import Replacements
from nnsight_compiler.passes.selections import Numbers

NAME = "narrow"
_MOST_PARTS = 8
"""How many parts of one value are kept instead of it."""

_APART = (ops.With, ops.Closure, ops.Backward, ops.Steps, ops.Edit)
"""Ops in whose regions a computation may mean something else, or run at another time."""


def narrow_saves(program: Program, arguments: Mapping[str, Any], remarks: Remarks, rely: Rely) -> Program:
    """The program that keeps only what is used; the program itself where all that it keeps is used.

    Args:
        arguments: the values of the parameters in this call.
        rely: is told each expression over the parameters on whose value the result rests.
    """
    while True:
        narrowing = _Narrowing(program, arguments)
        narrowed = narrowing.run()
        for span, what in narrowing.fired:
            remarks.fired(NAME, span, what)
        if narrowed is program:
            for span, why in narrowing.refused:
                remarks.refused(NAME, span, why)
            return program
        for text, value in narrowing.numbers.relied.items():
            rely(text, value)
        program = narrowed  # what is put into a list may itself have been kept from an earlier site


class _Narrowing:
    """One round. What ops become is noted first, and done at the end."""

    def __init__(self, program: Program, arguments: Mapping[str, Any]) -> None:
        self.program = program
        self.memory = Memory.of(program)
        self.layout = Layout(program)
        self.numbers = Numbers(program, self.memory, arguments)
        self.reductions = Reductions(self.memory, self.layout, self.numbers)
        self.containers = Containers(self.memory.origins, self.layout)
        self.writes = [
            (op, written) for op in program.walk() if not any(regions(op)) and (written := self.memory.writes(op))
        ]
        self.made = Replacements(program)
        self.builder = self.made.builder
        self.fired: list[tuple[Span, str]] = []
        self.refused: list[tuple[Span, str]] = []
        self.certainty = Certainty(self.memory, self.layout, self.numbers)
        self.touched: set[int] = set()
        self.looked_up: dict[str, Value] = {}

    def run(self) -> Program:
        if any(SETTINGS in written for _, written in self.writes):
            return self.program
        if any(isinstance(op, ops.Stop) for op in self.program.walk()):
            return self.program  # what a forward does not come to refuses its use, where it is used
        for op in self.program.walk():
            match op:
                case ops.Save(copy=True, result=result) if self._in_trace(op):
                    self._save(op, result)
                case ops.Build() | ops.Call():
                    container = self.containers.of(op)
                    if container is not None and container.puts:
                        self._container(container)
                case ops.Forward(method="trace", body=body):
                    for inner in body.ops:
                        if not isinstance(inner, ops.Save):
                            for value in defined(inner):
                                self._leaving(op, inner, value)
        return self.made.program() if self.touched else self.program

    # --- a value that is kept ---

    def _save(self, save: ops.Save, kept: Value) -> None:
        """A saved value of which only parts are used."""
        uses = self.layout.uses.get(kept.name, [])
        if not self._is_of_a_model(save.value) or not uses:
            return
        found = self._all(kept, uses, save)
        if found is None:
            return
        alone = len(found) == 1
        if not alone and self._is_written((kept, *(each.result for each in found if each.view)), ()):
            self._refuse(save, kept, "it is written to later")
            return
        self._touch(found, [save])
        self.made.instead[id(save)] = [
            op for group in _alike(found) for op in self._made(group, save, save.value, True)
        ]
        self._say(save, save.value, found)

    def _leaving(self, forward: ops.Forward, maker: Op, value: Value) -> None:
        """A value of which only parts are used after the forward that it is of."""
        outside = [
            op
            for op in self.layout.uses.get(value.name, [])
            if forward not in (each for each, _ in self.layout.around(op))
        ]
        if not outside or not self._is_of_a_model(value):
            return
        found = self._all(value, outside, forward)
        if found is None:
            return
        if self._is_written((value, *(each.result for each in found if each.view)), (forward,)):
            self._refuse(maker, value, "it is written to after the forward")
            return
        self._touch(found, [])
        made = [op for group in _alike(found) for op in self._made(group, forward, value, False)]
        self.made.ends.setdefault(id(forward), []).extend(made)
        self._say(maker, value, found)

    def _all(self, value: Value, uses: Sequence[Op], place: Op) -> list[Reduction] | None:
        """What these uses of a value are, if each is a reduction that can be made where an op stands."""
        each = [self.reductions.of(value, op) for op in uses]
        found = [reduction for reduction in each if reduction is not None]
        if not found:
            return None
        why = next(
            (f"line {op.span.line} uses all of it" for op, one in zip(uses, each, strict=True) if one is None), None
        )
        for reduction in found if why is None else ():
            why = why or self._why_not(reduction, place)
            if why is None and reduction.fragile and not self.certainty.is_sure(place, reduction):
                why = f"whether line {reduction.ops[-1].span.line} runs is known to the run only"
        if why is None and len(_alike(found)) > _MOST_PARTS:
            why = f"more than {_MOST_PARTS} parts of it are used"
        if why is not None:
            self._refuse(place, value, why)
            return None
        return None if self._is_touched(found, [place]) else found

    def _why_not(self, reduction: Reduction, place: Op) -> str | None:
        """Why a reduction cannot be made where an op stands."""
        for value in reduction.takes:
            if self.layout.missing(value, place) is not None:
                return f"`{value.name}` is known only after it has been kept"
        apart = self._apart(place)
        for op in reduction.ops:
            if self._apart(op) != apart:
                return f"line {op.span.line} stands in another `with`, or in a function"
        return None

    def _made(self, group: list[Reduction], place: Op, source: Operand, saved: bool) -> list[Op]:
        """The ops that compute and keep one part of a value; what was computed of it before becomes that."""
        first = group[0]
        alone = len(group) == 1 and not self.certainty.is_repeated(first, place)
        held = first.result if alone else self.builder.fresh(first.result.name, type=first.result.type)
        result = self.builder.fresh(type=held.type) if saved else held
        made = first.of(source, self.builder, self._looked_up, result)
        if saved:
            made.append(ops.Save(held, result, span=place.span))
        for reduction in () if alone else group:
            self._use(reduction, held)
        if alone:
            self._drop(first)
        return made

    # --- a container that is filled ---

    def _container(self, container: Container) -> None:
        taken: list[tuple[Element, Reduction]] = []
        other: Op | None = None
        for element in container.elements:
            for op in self.layout.uses.get(element.value.name, []):
                reduction = self.reductions.of(element.value, op)
                if reduction is not None:
                    taken.append((element, reduction))
                else:
                    other = other or op
        makers = [self.memory.origins.definition(put.value) for put in container.puts]
        if not taken or not any(op is not None and self._in_trace(op) for op in makers):
            return
        if other is not None:
            self._refuse(container.maker, None, f"line {other.span.line} uses all of an element")
            return
        keys = {put.key: put for put in container.puts}
        if None not in keys and all(element.key in keys for element, _ in taken):
            for key, put in keys.items():
                own = [(element, reduction) for element, reduction in taken if element.key == key]
                if own:
                    self._group(container, [put], own)
        else:
            self._group(container, list(container.puts), taken)

    def _group(self, container: Container, puts: list[Put], taken: list[tuple[Element, Reduction]]) -> None:
        """Values of a container of each of which the same is used."""
        found = [reduction for _, reduction in taken]
        first = found[0]
        whole = whole_loops(taken)
        why: str | None = None
        if len(_alike(found)) > 1:
            why = "different parts of its elements are used"
        for put in puts if why is None else ():
            place = self._kept_by(put) or put.op
            for reduction in found:
                why = why or self._why_not(reduction, place)
            if not self._is_of_a_model(put.value) or (self.layout.forward(place) and not self._in_trace(place)):
                why = why or f"line {put.op.span.line} puts something else into it, or in a generation"
        if (
            why is None
            and any(each.fragile for each in found)
            and not self.certainty.is_sure_for_all(container, puts, taken)
        ):
            why = f"whether line {first.ops[-1].span.line} runs for each of its elements is known to the run only"
        values = [*(element.value for element, _ in taken), *(each.result for each in found if each.view)]
        within = [op for put in puts for op in (put.op, self.layout.forward(put.op)) if op is not None]
        live = [each.result for each in found if each.view and self.layout.forward(each.ops[0]) in within]
        if why is None and (self._is_written(values, within) or self._is_written(live, ())):
            why = "its elements are written to"
        if why is not None:
            self._refuse(container.maker, None, why)
            return
        places = [place for put in puts for place in (put.op, self._kept_by(put)) if place is not None]
        if self._is_touched(found, places) or len({id(put.op) for put in puts}) < len(puts):
            return
        self._touch(found, places)
        for put in puts:
            self._put(put, first)
        alone = len(found) == 1
        for element in dict.fromkeys(element for element, _ in taken):
            held = Value(element.value.name, first.result.type)
            self.made.retype(held)
            for each, reduction in taken:
                if each == element:
                    if alone and not self.certainty.is_repeated(reduction, container.maker, whole):
                        self._drop(reduction, held)
                    else:
                        self._use(reduction, held)
        self._say(container.maker, None, found)

    def _kept_by(self, put: Put) -> ops.Save | None:
        """The save whose one use is that its result is put into a container."""
        op = self.memory.origins.definition(put.value)
        if isinstance(op, ops.Save) and op.copy and self.layout.uses[put.value.name] == [put.op]:
            return op
        return None

    def _put(self, put: Put, reduction: Reduction) -> None:
        """Puts a part of a value into a container, and what keeps no more alive."""
        save = self._kept_by(put)
        kept = self.builder.fresh(type=reduction.result.type)
        if save is not None:
            held = Value(save.result.name, reduction.result.type)
            made = reduction.of(save.value, self.builder, self._looked_up, kept)
            self.made.instead[id(save)] = [*made, ops.Save(held, kept, span=save.span)]
            self.made.retype(held)
            return
        made = reduction.of(put.value, self.builder, self._looked_up, kept)
        if reduction.view:
            copied = self.builder.fresh(type=kept.type)
            made.append(ops.Save(copied, kept, span=put.op.span))
            kept = copied
        self.made.changes[id(put.op)] = {put.value.name: kept}
        self.made.instead[id(put.op)] = [*made, put.op]

    # --- what is known of ops and values ---

    def _in_trace(self, op: Op) -> bool:
        forward = self.layout.forward(op)
        return forward is not None and forward.method == "trace"

    def _is_of_a_model(self, operand: Operand) -> bool:
        """Whether a value is of a model, or a tensor."""
        return self.memory.origins.is_from_model(operand) or self.memory.origins.is_tensor(operand)

    def _apart(self, op: Op) -> list[int]:
        return [id(each) for each, _ in self.layout.around(op) if isinstance(each, _APART)]

    def _is_written(self, values: Iterable[Value], within: Sequence[Op]) -> bool:
        """Whether an op, but these and those in these forwards, may write to one of these values. Of what stands at a
        site they are copies, which nothing else is."""
        roots: Roots = frozenset().union(*map(self.memory.roots, values)) - self.memory.origins.iterators
        given = frozenset(root for root in roots if isinstance(root, (Outside, Weight)))
        return any(
            roots & written or self.memory.overlap(written, given)
            for op, written in self.writes
            if all(op is not each and self.layout.forward(op) is not each for each in within)
        )

    # --- notes ---

    def _looked_up(self, value: Value) -> Value:
        """A function or a constant of torch's, looked up where the program begins."""
        path = self.reductions.path(value)
        if path not in self.looked_up:
            op = self.memory.origins.definitions[value.name]
            found = self.looked_up[path] = self.builder.fresh(path.rpartition(".")[2].rpartition(" ")[2])
            made = rewrite(op, operand=self._looked_up, result=lambda _: found)
            self.made.starts.append(made)
        return self.looked_up[path]

    def _is_touched(self, found: list[Reduction], places: Iterable[Op]) -> bool:
        chain = {id(op) for reduction in found for op in reduction.ops}
        return bool((chain | {id(place) for place in places}) & self.touched)

    def _touch(self, found: list[Reduction], places: Iterable[Op]) -> None:
        self.touched |= {id(op) for reduction in found for op in reduction.ops} | {id(place) for place in places}

    def _drop(self, reduction: Reduction, held: Value | None = None) -> None:
        """What a reduction gave is made elsewhere; it is another value where that is given."""
        for op in reduction.ops:
            self.made.instead[id(op)] = []
            looked_up = self.memory.origins.definition(op.function) if isinstance(op, ops.Call) else None
            if isinstance(looked_up, ops.Attribute) and self.layout.uses[looked_up.result.name] == [op]:
                self.made.instead[id(looked_up)] = []
        if held is not None:
            self.made.becomes[reduction.result.name] = held

    def _use(self, reduction: Reduction, held: Value) -> None:
        """What a reduction gives is, from now on, what is kept, or a copy of it where it was new each time."""
        self._drop(reduction)
        if reduction.view:
            self.made.becomes[reduction.result.name] = held
        else:
            copied = ops.Save(reduction.result, held, span=reduction.ops[-1].span)
            self.made.instead[id(reduction.ops[-1])] = [copied]

    def _named(self, value: Operand | None) -> str:
        op = self.memory.origins.definition(value) if value is not None else None
        match op:
            case ops.Read(module=Module(path=path), port=port):
                return f"the {port} of `{path}`" if path else f"the {port} of the model"
            case ops.Save(value=inner):
                return self._named(inner)
            case ops.Item(object=base, index=Literal()) | ops.Attribute(object=base):
                return f"a part of {self._named(base)}"
            case _ if isinstance(value, Value) and not value.name[0].isdecimal():
                return f"`{value.name}`"
            case _:
                return "a value"

    def _say(self, place: Op, value: Operand | None, found: list[Reduction]) -> None:
        texts = ", ".join(f"`{text}`" for text in dict.fromkeys(each.text.strip() for each in found))
        what = self._named(value) if value is not None else "each element"
        self.fired.append((place.span, f"of {what}, {texts} alone is kept"))

    def _refuse(self, place: Op, value: Operand | None, why: str) -> None:
        what = self._named(value) if value is not None else "each element"
        self.refused.append((place.span, f"{what} is kept whole: {why}"))


def _alike(found: list[Reduction]) -> list[list[Reduction]]:
    """Reductions by what they compute."""
    groups: dict[Any, list[Reduction]] = {}
    for reduction in found:
        groups.setdefault(reduction.key, []).append(reduction)
    return list(groups.values())
