"""Runs modules that treat every position by itself on the positions that are used alone.

    %logits = read %model@lm_head output          %h = read %model@transformer.ln_f input
    %0 = item %logits[0, -1, %io]                 %last = item %h[0, -1]
                                          ──▶     %normed = call %model@transformer.ln_f(%last)
                                                  %w = attr %model@lm_head.weight
                                                  %row = item %w[%io]
                                                  %0 = %normed @ %row

What a module gave, or gives where the program calls it, is indexed and nothing else. Then what it is given is indexed
instead, and the module is called on that; so is the module before it, where the one is given the very output of the
other. Of a linear module single entries are products with those rows of its weight. Where the whole model's `logits`
are the output of its head, they stand for that.

Legal where

- each module is proved to treat positions apart, by the operations that it runs, and has no hooks (`modules` tells);
- every use of the value is an index of whole numbers and slices in all dimensions but the last, and what these are is
  known where the module was called; nothing writes to the value or to a part of it;
- for single entries: the forward does not record the gradients of all weights, and the program does not name the
  weights of the module;
- for what a site gives: the module runs once, in a `trace` of all rows, and nothing that the program reads, writes or
  skips comes at the input of the first such module or later, so that the model need not run them. That one module is
  given the very output of another has been observed on inputs of the same kind, so that the forward must be given
  tensors and switches alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Argument, Op
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import regions, walk
from nnsight_compiler.ir.types import TensorType, Type
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Value, values_in
from nnsight_compiler.passes.known_calls import MODULE_CALL
from nnsight_compiler.passes.layout import Layout
from nnsight_compiler.passes.memory import Fresh, Memory, Roots, Site
from nnsight_compiler.passes.parts import Instead, Link, Modules, Positionwise, Rely, Wide
from nnsight_compiler.passes.remarks import Remarks
from nnsight_compiler.passes.selections import Numbers, Selection, selection
from nnsight_compiler.passes.sites import Order, Orders, event_port, locate, place_of

NAME = "narrow"
_MOST_PARTS = 8
"""Of how many parts of a value each is computed by itself: each reads the weights of the modules again."""

_INPUTS = frozenset({
    "input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids",
    "output_hidden_states", "output_attentions", "use_cache", "grad",
})  # fmt: skip
"""Arguments of a forward by name that change nothing of which module is given the output of which."""


def narrow(
    program: Program,
    orders: Orders,
    modules: Modules,
    arguments: Mapping[str, Any],
    remarks: Remarks,
    rely: Rely,
) -> Program:
    """The program with modules run on what is used alone; the program itself where nothing can be narrowed.

    Args:
        arguments: the values of the parameters in this call.
        rely: is told each expression over the parameters on whose value the result rests.
    """
    named = frozenset(
        op.object for op in program.walk() if isinstance(op, ops.Attribute) and isinstance(op.object, Module)
    )
    while True:
        narrowing = _Narrowing(program, orders, modules, arguments, remarks, named)
        narrowed = narrowing.run()
        if narrowed is program:
            return program
        for text, value in narrowing.numbers.relied.items():
            rely(text, value)
        program = narrowed  # the source of a call may be what a site gives


class _Narrowing:
    def __init__(
        self,
        program: Program,
        orders: Orders,
        modules: Modules,
        arguments: Mapping[str, Any],
        remarks: Remarks,
        named: frozenset[Module],
    ) -> None:
        self.program = program
        self.named = named
        self.orders = orders
        self.modules = modules
        self.remarks = remarks
        self.memory = Memory.of(program)
        self.layout = Layout(program)
        self.numbers = Numbers(program, self.memory, arguments)
        self.written = frozenset().union(*(self.memory.writes(op) for op in program.walk() if not any(regions(op))))
        self.made = Instead(program, self._is_product)

    def run(self) -> Program:
        for op in self.program.walk():
            if isinstance(op, ops.Call):
                self._narrow_call(op)
            elif isinstance(op, ops.Forward) and op.method == "trace":
                self._narrow_sites(op)
        return self.made.program()

    # --- what the program calls ---

    def _link(self, operand: Operand) -> Link | None:
        """The call in a forward of a module that treats positions apart, and that an operand is the result of."""
        op = self.memory.origins.definition(operand)
        match op:
            case ops.Call(function=Module() as module, arguments=(Argument(keyword=None, star=""),)):
                forward = self.layout.forward(op)
                if op.target == MODULE_CALL and forward is not None and forward.model == module.model:
                    kind = self.modules(forward, module.path)
                    return Link(module, kind, op) if isinstance(kind, Positionwise) else None
        return None

    def _narrow_call(self, op: ops.Call) -> None:
        last = self._link(op.result)
        if last is None or not self._is_indexed(op.result):
            return
        links = [last]
        while True:
            source = _given(links[0].op)
            before = self._link(source)
            if before is None or len(self.layout.uses[source.name]) > 1:  # type: ignore[union-attr]
                break
            if not self.layout.alone(before.op, op):
                break
            links.insert(0, before)
        rank = self._rank(source)
        why: str | None = None
        for start in range(len(links) if rank is not None else 0):
            chain = links[start:]
            wide = Wide(op.result, chain[0].op, chain, _given(chain[0].op), [link.op for link in chain])
            why = self._parts(wide, rank or 0)
            if why is None:
                self._make(wide)
                return
        if why:
            self.remarks.refused(NAME, op.span, f"`{last.module.path}` is run for all positions: {why}")

    def _rank(self, operand: Operand) -> int | None:
        """How many dimensions a value has in every call."""
        op = self.memory.origins.definition(operand)
        match op:
            case ops.Read(result=result):
                return _dimensions(result.type)
            case ops.Attribute(object=Value() as base) | ops.Item(object=Value() as base, index=Literal()) if (
                isinstance(self.memory.origins.definition(base), ops.Read) and not isinstance(base.type, TensorType)
            ):  # a part of what a module returned
                return _dimensions(op.result.type)
            case ops.Save(value=inner) | ops.Bound(value=inner):
                return self._rank(inner)
            case ops.Item(object=base, index=index):
                rank = self._rank(base)
                parts = selection(index, rank, self.numbers) if rank is not None else ""
                if isinstance(parts, str) or not isinstance(parts.entry, Slice):
                    return None
                return 1 + sum(not self.numbers.is_number(part) for part in parts.lead)
            case ops.Call():
                link = self._link(operand)
                return None if link is None else self._rank(_given(link.op))
            case _:
                return None

    # --- what stands at sites ---

    def _narrow_sites(self, forward: ops.Forward) -> None:
        order = self.orders(forward)
        accesses = list(self._accesses(forward, order))
        found = {id(wide.gone[0]): wide for op, _ in accesses if (wide := self._site(op, forward, order)) is not None}
        while found:
            last, keeper = max(
                ((time, op) for op, time in accesses if id(op) not in found), key=_first, default=(-1, None)
            )
            late = {key: wide for key, wide in found.items() if self._time(wide.links[-1], order) <= last}
            for wide in late.values():
                line = keeper.span.line if keeper is not None else 0
                self.remarks.refused(
                    NAME,
                    wide.place.span,
                    f"{wide.name} is run for all positions: line {line} needs what the model does there or later",
                )
            if not late:
                break
            found = {key: wide for key, wide in found.items() if key not in late}
        for wide in found.values():
            self._extend(wide, forward, order, last)
            self._make(wide)

    @staticmethod
    def _time(link: Link, order: Order) -> int:
        return locate(link.module.path, "input", None, link.op.span, order).time

    def _accesses(self, forward: ops.Forward, order: Order) -> Iterator[tuple[Op, int]]:
        """The ops that need or change what the model does, with when that is."""
        for op in walk(forward.body):
            if isinstance(op, (ops.Read, ops.Write, ops.Skip)):
                yield op, place_of(op, order).time
            elif not any(regions(op)):
                for root in self.memory.writes(op):
                    if isinstance(root, Site) and root.forward == forward.result.name:
                        yield op, locate(root.module, event_port(root.port), root.call, op.span, order).time

    def _site(self, op: Op, forward: ops.Forward, order: Order) -> Wide | None:
        """What an op reads of a module that runs once and treats positions apart, if parts of it alone are used."""
        match op:
            case ops.Read(module=Module() as module, port="output", call=None, result=value):
                pass
            case _:
                return None
        gone: list[Op] = [op]
        path = module.path
        part = self._part(value)
        if part is not None:
            inner, name = part
            value = inner.result
            gone.append(inner)
            if not self._is_indexed(value):
                return None
            giver = order.giver(path, "output", name) if self._is_linked(forward) else None
            if giver is None:
                if not path or not name.isdecimal():  # a part of what a block returns is its own
                    self.remarks.refused(NAME, op.span, f"`{name}` is not the very output of a module")
                return None
            path = giver
        if not self._is_indexed(value):
            return None
        kind = self.modules(forward, path)
        if isinstance(kind, str):
            if kind:
                self.remarks.refused(NAME, op.span, f"`{path}` is run for all positions: {kind}")
            return None
        wide = Wide(value, op, [Link(Module(module.model, path), kind, op)], None, gone)
        rank = self._rank(value)
        why = self._parts(wide, rank) if rank is not None else "how many dimensions it gives is not known"
        if op.rows is not None:
            why = "invokes see rows of their own there"
        if order.count(path) != 1:
            why = "it does not run once"
        if why:
            self.remarks.refused(NAME, op.span, f"`{path}` is run for all positions: {why}")
        return None if why is not None else wide

    def _part(self, value: Value) -> tuple[ops.Attribute | ops.Item, str] | None:
        """The one use of what a model returned, where that takes a part by its name or number, and which."""
        uses = self.layout.uses.get(value.name, [])
        match uses:
            case [ops.Attribute(name=name) as use] if not isinstance(value.type, TensorType):
                return use, name
            case [ops.Item(index=Literal(value=str() | int() as index)) as use] if not isinstance(
                value.type, TensorType
            ):
                return use, str(index)
            case _:
                return None

    def _extend(self, wide: Wide, forward: ops.Forward, order: Order, last: int) -> None:
        """Takes in the modules that run just before, as long as nothing needs what they are given or give."""
        while self._is_linked(forward):
            first = wide.links[0]
            path = order.giver(first.module.path, "input")
            kind = self.modules(forward, path) if path is not None and order.count(path) == 1 else ""
            if path is None or isinstance(kind, str):
                return
            link = Link(Module(first.module.model, path), kind, first.op)
            if self._time(link, order) <= last or kind.gives != first.kind.width:
                return
            wide.links.insert(0, link)

    @staticmethod
    def _is_linked(forward: ops.Forward) -> bool:
        """Whether what was observed of a forward holds for others of its kind: what may change from call to call is one
        input, and not a switch that the model's code looks at."""
        positional = sum(argument.keyword is None for argument in forward.arguments)
        named = all(argument.keyword is None or argument.keyword in _INPUTS for argument in forward.arguments)
        return positional <= 1 and named and not any(argument.star for argument in forward.arguments)

    # --- which parts are used ---

    def _is_indexed(self, value: Value) -> bool:
        """Whether a value is used, and indexed only."""
        uses = self.layout.uses.get(value.name, [])
        return bool(uses) and all(isinstance(op, ops.Item) and value not in values_in(op.index) for op in uses)

    def _parts(self, wide: Wide, rank: int) -> str | None:
        """Finds the parts of a value that are used; why they cannot be computed alone, which is empty where nothing
        would be left out, and `None` where they can."""
        wide.parts = []
        for op in self.layout.uses[wide.value.name]:
            assert isinstance(op, ops.Item)
            parts = selection(op.index, rank, self.numbers)
            if isinstance(parts, str):
                return parts
            missing = [late for part in parts.lead if (late := self.layout.missing(part, wide.place)) is not None]
            if missing:
                return f"that `{missing[0].name}` is used is known only after it has run"
            wide.parts.append((op, parts))
        if self._own(wide) & self.written:
            return "what it gives is written to"
        whole = [parts for _, parts in wide.parts if parts.takes_all]
        if not all(self._is_product(wide, parts) for parts in whole):
            return ""
        if len({parts.lead for _, parts in wide.parts}) > _MOST_PARTS:
            return f"more than {_MOST_PARTS} parts of it are used, each by itself"
        return None

    def _own(self, wide: Wide) -> Roots:
        """The storages of a value itself: where a module that the program calls gives back what it was given, it gives
        back a part as well."""
        return self.memory.roots(wide.value) if wide.source is None else frozenset({Fresh(wide.value.name)})

    def _is_product(self, wide: Wide, parts: Selection) -> bool:
        """Whether a part is a single entry of what a linear module gives, and its weights are asked no gradient."""
        module, kind, op = wide.links[-1].module, wide.links[-1].kind, wide.links[-1].op
        forward = self.layout.forward(op)
        trained = forward is None or any(argument.keyword == "grad" for argument in forward.arguments)
        return kind.linear and not trained and module not in self.named and self.numbers.is_number(parts.entry)

    # --- what is made instead ---

    def _make(self, wide: Wide) -> None:
        self.made.make(wide)
        self._remark(wide)

    def _remark(self, wide: Wide) -> None:
        taken = ", ".join(dict.fromkeys(str(parts) for _, parts in wide.parts))
        entries = all(self._is_product(wide, parts) for _, parts in wide.parts)
        how = ", the last by rows of its weight" if entries else ""
        self.remarks.fired(NAME, wide.place.span, f"{wide.name} for {taken} alone{how}")


def _given(call: Op) -> Operand:
    assert isinstance(call, ops.Call)
    return call.arguments[0].value


def _dimensions(known: Type) -> int | None:
    return len(known.shape) if isinstance(known, TensorType) and known.shape is not None else None


def _first(pair: tuple[int, Op | None]) -> int:
    return pair[0]
