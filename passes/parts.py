"""Values of which parts are used, and what computes these parts by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import Argument, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import rewrite
from nnsight_compiler.ir.types import ANY, Dimension, TensorType, Type
from nnsight_compiler.ir.values import Module, Operand, Value, map_operand
from nnsight_compiler.passes.known_calls import MODULE_CALL
from nnsight_compiler.passes.selections import Selection


@final
@dataclass(frozen=True, slots=True)
class Positionwise:
    """A module that treats every position by itself: the widths and dtypes of what it is given and gives. linear:
    whether each entry that it gives is a product with a row of its `weight`, and with `bias` an entry of that added."""

    width: int
    gives: int
    dtype: str
    gives_dtype: str
    linear: bool = False
    bias: bool = False


Modules = Callable[[ops.Forward, str], "Positionwise | str"]
"""What a module of a forward's model is, or why it is not known to treat positions apart."""

Rely = Callable[[str, object], None]
"""Is told an expression over the parameters, on whose value a program rests."""


@final
@dataclass(frozen=True, slots=True)
class Link:
    """One of the modules that a value comes from, called or run by the model; `op` is what says so in the program."""

    module: Module
    kind: Positionwise
    op: Op


@final
@dataclass(eq=False, slots=True)
class Wide:
    """A value that modules gave, of which parts are used.

    place: the op in whose place the parts are made. links: the modules, first to last. source: what the first of them
    is given; `None` where that is read at its site. gone: the ops in whose place nothing comes.
    """

    value: Value
    place: Op
    links: list[Link]
    source: Operand | None
    gone: list[Op]
    parts: list[tuple[ops.Item, Selection]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return ", ".join(f"`{link.module.path}`" for link in self.links)


class Instead:
    """A program in the making, in which ops stand in the place of others."""

    def __init__(self, program: Program, is_product: Callable[[Wide, Selection], bool]) -> None:
        self.original = program
        self.is_product = is_product
        self.builder = Builder(value.name for value in program.values())
        self.instead: dict[int, list[Op]] = {}
        self.becomes: dict[str, Operand] = {}

    def program(self) -> Program:
        """The program; the original where nothing was put in the place of anything."""
        return replace(self.original, body=self._region(self.original.body)) if self.instead else self.original

    def _region(self, region: Region) -> Region:
        made = [new for op in region.ops for new in self.instead.get(id(op), [op])]
        return Region(region.parameters, tuple(rewrite(op, self._final, self._region) for op in made))

    def _final(self, value: Value) -> Operand:
        found = self.becomes.get(value.name)
        return value if found is None else map_operand(found, self._final)

    def make(self, wide: Wide) -> None:
        """Computes the parts of a value where the whole was computed."""
        first, last = wide.links[0], wide.links[-1]
        shape = wide.value.type
        span = wide.place.span
        made: list[Op] = []
        source = wide.source
        if source is None:
            read = self.builder.fresh(type=_with_width(shape, first.kind.width, first.kind.dtype))
            made.append(ops.Read(read, first.module, "input", span=span))
            source = read
        products: dict[str, Value] = {}
        for lead in dict.fromkeys(parts.lead for _, parts in wide.parts):
            uses = [(op, parts) for op, parts in wide.parts if parts.lead == lead]
            whole = [op for op, parts in uses if not self.is_product(wide, parts)]
            held = source
            if not uses[0][1].takes_all:
                held = self.builder.fresh(type=uses[0][1].of(shape, first.kind.width, first.kind.dtype))
                made.append(ops.Item(held, source, uses[0][1].index, span=span))
            for link in wide.links if whole else wide.links[:-1]:
                kind = link.kind
                given = held
                held = self.builder.fresh(type=uses[0][1].of(shape, kind.gives, kind.gives_dtype))
                made.append(ops.Call(held, link.module, (Argument(given),), MODULE_CALL, span=link.op.span))
            for item, parts in uses:
                if whole:
                    self._take(item, parts, held)
                else:
                    products = products or self._weights(last, made)
                    self._product(item, parts.entry, held, products)
        for op in wide.gone:
            self.instead[id(op)] = []
        self.instead[id(wide.place)] = made

    def _take(self, op: ops.Item, parts: Selection, held: Operand) -> None:
        if parts.rest is None:
            self.instead[id(op)] = []
            self.becomes[op.result.name] = held
        else:
            self.instead[id(op)] = [replace(op, object=held, index=parts.rest)]

    def _weights(self, last: Link, made: list[Op]) -> dict[str, Value]:
        """The weights of a linear module, as constants: a forward counts those that the program names."""
        found: dict[str, Value] = {}
        for name in ("weight", "bias") if last.kind.bias else ("weight",):
            held, method, constant = self.builder.fresh(), self.builder.fresh(), self.builder.fresh(name)
            made.append(ops.Attribute(held, last.module, name, span=last.op.span))
            made.append(ops.Attribute(method, held, "detach", span=last.op.span))
            made.append(ops.Call(constant, method, (), "torch.Tensor.detach", span=last.op.span))
            found[name] = constant
        return found

    def _product(self, op: ops.Item, entry: Operand, held: Operand, weights: Mapping[str, Value]) -> None:
        row = self.builder.fresh()
        made: list[Op] = [ops.Item(row, weights["weight"], entry, span=op.span)]
        if "bias" in weights:
            product, offset = self.builder.fresh(type=op.result.type), self.builder.fresh()
            made.append(ops.Operator(product, "@", (held, row), span=op.span))
            made.append(ops.Item(offset, weights["bias"], entry, span=op.span))
            made.append(ops.Operator(op.result, "+", (product, offset), span=op.span))
        else:
            made.append(ops.Operator(op.result, "@", (held, row), span=op.span))
        self.instead[id(op)] = made


def _with_width(whole: Type, width: int, dtype: str) -> Type:
    if not isinstance(whole, TensorType) or whole.shape is None:
        return ANY
    return TensorType(dtype, (*whole.shape[:-1], Dimension(width)))
