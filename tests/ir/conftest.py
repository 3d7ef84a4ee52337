"""Random well-formed programs over every op, for the property tests of the IR."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args, get_origin
from typing import Literal as OneOf

import pytest
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import Argument, Element, FormatPart, Handler, Op, Parameter, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.schema import schema
from nnsight_compiler.ir.span import NOWHERE, Span
from nnsight_compiler.ir.syntax import ARITHMETIC, BINARY, UNARY
from nnsight_compiler.ir.types import ANY, Dimension, ModuleType, TensorType, Type
from nnsight_compiler.ir.values import NONE, UNBOUND, Literal, Module, Operand, Slice, Tuple, Value

T = TypeVar("T")

STRINGS = (
    "",
    "x",
    "a b",
    "it's",
    '"',
    "\\",
    "\n",
    "# no comment: 3",
    "\x00",
    "\ud800",
    "é",
    "\u2028",
    "😀",
    "None",
    "%x",
    "{",
)
NAMES = ("x", "layer", "naïve", "call", "None", "slice", "then", "<lambda>", "a b", "", "1", "x'y", "a.b", "k=1", "·")
HINTS = ("", "", "h", "source", "été", "_", "a b", "None")
PATHS = ("transformer.h.3", "", "lm_head", "h.0.a-b", "0", "a b")
TEXTS = (
    "layer=3",
    "x",
    "a.b",
    "x=-1.5",
    "x = 1",
    "a, b",
    "",
    "after",
    "'q'",
    "k=0x1fz",
    "k=1_0",
    "torch.Tensor.softmax",
)
NUMBERS = (0, 1, -1, 2**64, 1 - 2**53, 10**4200, -(16**300))
FLOATS = (0.0, -0.0, 1.5, 1e300, 1e-7, math.nan, math.inf, -math.inf)
FILES = ("demo.py", "a b.py", "<ipython-input-1>", "it's:3", "C:\\x.py")


@dataclass(frozen=True)
class Place:
    """What may stand where code is being made (compare the verifier's rules, found again here independently)."""

    loop: int | None = None
    yields: int | None = None
    needed: int = 0
    forward: bool = False
    backward: bool = False
    generator: bool = False
    exports: int = 0
    strand: bool = False
    together: bool = False
    depth: int = 0


class Maker:
    """Makes one program.

    Its choices come from a seed rather than one by one from hypothesis, whose examples of such deep structures are
    mostly tiny; `size` bounds the number of ops of a region, so that failures can still be made smaller.
    """

    def __init__(self, seed: int, size: int) -> None:
        self.random = random.Random(seed)
        self.size = size
        self.builder = Builder()
        self.visible: list[Value] = []

    # --- choices ---

    def below(self, count: int) -> int:
        return self.random.randrange(count)

    def pick(self, choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def flag(self) -> bool:
        return self.below(2) == 1

    def many(self, make: Callable[[], T], most: int = 2) -> tuple[T, ...]:
        return tuple(make() for _ in range(self.below(most + 1)))

    # --- values ---

    def type(self) -> Type:
        match self.below(6):
            case 0:
                return ModuleType(self.pick(("GPT2Block", "a b")))
            case 1:
                dtype = self.pick(
                    (None, "float32", "bfloat16", "bool", "int64", "float8_e4m3fn", "f32", "any", "odd one")
                )
                return TensorType(dtype, self.many(self.dimension, 3) if self.flag() else None)
            case _:
                return ANY

    def dimension(self) -> Dimension:
        return Dimension(self.pick((None, 0, 1, 768)), self.pick((None, "rows", "tokens", "an axis")))

    def fresh(self) -> Value:
        return self.builder.fresh(self.pick(HINTS), self.type())

    def define(self) -> Value:
        self.visible.append(self.fresh())
        return self.visible[-1]

    def operand(self, depth: int = 0) -> Operand:
        match self.below(8 if depth < 2 else 5):
            case 0 | 1 | 2:
                return self.pick(self.visible)
            case 3:
                return self.module()
            case 5:
                return Tuple(self.many(lambda: self.operand(depth + 1), 3))
            case 6 | 7:
                parts = [NONE if self.flag() else self.operand(depth + 1) for _ in range(3)]
                return Slice(*parts)
            case _:
                return Literal(self.literal())

    def literal(self) -> object:
        def real() -> float:
            bits: float = struct.unpack("d", self.random.randbytes(8))[0]
            return self.pick((*FLOATS, bits))

        match self.below(6):
            case 0:
                return self.pick((None, True, False, ...))
            case 1:
                return self.pick((*NUMBERS, self.random.getrandbits(80) - 2**79))
            case 2:
                return real()
            case 3:
                return complex(real(), real())
            case 4:
                return self.pick((*STRINGS, "".join(chr(self.below(0x110000)) for _ in range(4))))
            case _:
                return self.random.randbytes(self.below(5))

    def module(self) -> Operand:
        return Module(self.pick(self.visible), self.pick(PATHS))

    def merged(self) -> Operand:
        return UNBOUND if self.below(4) == 0 else self.operand()

    def merges(self, count: int) -> tuple[Operand, ...]:
        return tuple(self.merged() for _ in range(count))

    def arguments(self) -> tuple[Argument, ...]:
        made = []
        for number in range(self.below(3)):
            keyword = f"{self.pick(NAMES)}{number}" if self.flag() else None
            star = "" if keyword is not None else self.pick(("", "*", "**"))
            made.append(Argument(self.operand(), keyword, star))
        return tuple(made)

    def signature(self, generator: bool = False) -> tuple[Parameter, ...]:
        """Parameters in an order that Python allows. Their values are not visible yet."""
        if generator:
            return (Parameter(self.fresh()),)
        made, optional = [], False
        for kind in ("positional_only", "positional_or_keyword", "var_positional", "keyword_only", "var_keyword"):
            for _ in range(self.below(2 if kind.startswith("var") else 3)):
                if "positional" in kind.split("_")[0]:
                    optional = optional or self.flag()
                has_default = self.flag() if kind == "keyword_only" else optional and not kind.startswith("var")
                made.append(Parameter(self.fresh(), kind, has_default))  # type: ignore[arg-type]
        return tuple(made)

    def span(self) -> Span:
        return Span(self.pick(FILES), self.below(50) + 1, self.below(5), 60, 3) if self.flag() else NOWHERE

    # --- regions ---

    def region(
        self, place: Place, parameters: int = 0, signature: tuple[Parameter, ...] = (), closed: bool = True
    ) -> Region:
        before = len(self.visible)
        values = tuple(self.define() for _ in range(parameters))
        self.visible.extend(parameter.value for parameter in signature)
        place = replace(place, depth=place.depth + 1)
        made = [self.op(place) for _ in range(self.below(1 + (self.size if place.depth < 4 else 1)))]
        end = self.terminator(place)
        if end is not None:
            made.append(end)
        if closed:
            del self.visible[before:]
        return Region(values, tuple(made))

    def terminator(self, place: Place) -> Op | None:
        span = self.span()
        choices: list[Callable[[], Op | None]] = []
        if not place.needed:
            choices += [lambda: None] * 3
        if place.yields is not None:
            choices += [lambda: ops.Yield(self.merges(place.yields or 0), span=span)] * 2
        if place.loop is not None:
            choices.append(lambda: ops.Continue(self.merges(place.loop or 0), span=span))
            choices.append(lambda: ops.Break(self.merges(place.loop or 0), span=span))
        if not place.generator and not place.strand:
            choices.append(lambda: ops.Return(self.returned(place), span=span))
        choices.append(lambda: ops.Raise(span=span))
        choices.append(lambda: ops.Raise(self.operand(), self.operand() if self.flag() else None, span=span))
        return self.pick(choices)()

    def returned(self, place: Place) -> Operand:
        return Tuple(self.merges(place.exports)) if place.exports else self.operand()

    def within(self, place: Place, **changes: Any) -> Region:
        """A transparent region."""
        return self.region(replace(place, yields=0, needed=0, **changes), closed=False)

    def inner(self, place: Place, yields: int = 0, parameters: int = 0, **changes: Any) -> Region:
        """A closed region that ends in a `yield`."""
        return self.region(replace(place, yields=yields, needed=yields, **changes), parameters)

    # --- ops ---

    def op(self, place: Place) -> Op:
        kinds = [*SIMPLE]
        if place.depth < 4:
            kinds += [*NESTED, *NESTED]
        if place.forward:
            kinds += [ops.Read, ops.Write, ops.Skip, ops.Stop, ops.Record, ops.FromEnd] * 2
            kinds += [ops.Require, *([ops.Invoke, ops.Steps, ops.At, ops.Applied] * 2 if place.depth < 4 else [])]
        if place.backward:
            kinds += [ops.Grad, ops.SetGrad] * 3 + ([ops.AtGradient] * 2 if place.depth < 4 else [])
        if place.generator:
            kinds += [ops.Emit] * 6
        if place.together and place.depth < 4:
            kinds += [ops.Postponed] * 9
        kind = self.pick(kinds)
        place = replace(place, together=False)
        make = getattr(self, f"make_{kind.__name__.lower()}", None)
        held = self.plain(kind, place) if make is None else make(place)
        return kind(span=self.span(), **held)

    def plain(self, kind: type[Op], place: Place) -> dict[str, Any]:
        """The fields of an op whose fields have nothing to do with each other, by their annotations."""
        hints = dict(schema(kind))
        body, result = hints.pop("body", None), hints.pop("result", None)
        held: dict[str, Any] = {}
        for name, hint in hints.items():
            if name == "module":
                held[name] = self.module()
            elif hint == Operand:
                held[name] = self.merged() if (kind, name) in MERGES else self.operand()
            elif get_origin(hint) is OneOf:
                held[name] = self.pick(get_args(hint))
            else:
                held[name] = self.made_of(hint)
        if result is not None:
            held["result"] = self.define()
        if body is not None:
            changes = {"forward": {"forward": True}, "backward": {"backward": True}}.get(kind.__name__.lower(), {})
            held["body"] = self.within(place, **changes)
        return held

    def made_of(self, hint: Any) -> Any:
        if hint is str:
            return self.pick(NAMES)
        if hint is bool:
            return self.flag()
        if hint == str | None:
            return self.pick((None, *NAMES))
        if hint == int | None:
            return self.pick((None, 0, 2, -1))
        if hint == Operand | None:
            return self.pick((None, self.operand()))
        if hint == tuple[Operand, ...]:
            return self.many(self.operand)
        assert get_args(hint)[0] is Argument, hint
        return self.arguments()

    def make_import(self, place: Place) -> dict[str, Any]:
        module = self.pick(("torch", "torch.nn.functional", "naïve.x"))
        choices = (
            {"module": module},
            {"module": module, "leaf": True},
            {"module": module, "name": "x"},
            {"module": module, "name": "x", "level": self.below(5)},
            {"module": "", "name": "x", "level": 1 + self.below(4)},
        )
        return {**self.pick(choices), "result": self.define()}

    def make_delete(self, place: Place) -> dict[str, Any]:
        index = self.operand() if self.flag() else None
        return {"object": self.operand(), "index": index, "name": self.pick(NAMES) if index is None else None}

    def make_build(self, place: Place) -> dict[str, Any]:
        kind = self.pick(("tuple", "list", "set", "dict"))

        def element() -> Element:
            starred = self.flag()
            return Element(self.operand(), self.operand() if kind == "dict" and not starred else None, starred)

        return {"kind": kind, "elements": self.many(element, 3), "result": self.define()}

    def make_format(self, place: Place) -> dict[str, Any]:
        def part() -> str | FormatPart:
            if self.flag():
                return str(self.pick(STRINGS))
            return FormatPart(self.operand(), self.pick(("", "r", "s", "a")), self.operand() if self.flag() else None)

        return {"parts": self.many(part, 3), "result": self.define()}

    def make_unpack(self, place: Place) -> dict[str, Any]:
        value = self.operand()
        results = self.many(self.define, 3)
        return {"value": value, "results": results, "star": self.below(len(results) + 1) - 1}

    def make_operator(self, place: Place) -> dict[str, Any]:
        signs, in_place = self.pick(((UNARY, False), (BINARY, False), (ARITHMETIC, True)))
        operands = tuple(self.operand() for _ in range(1 if signs is UNARY else 2))
        sign = self.pick(sorted(signs))
        return {"operator": sign, "operands": operands, "in_place": in_place, "result": self.define()}

    def make_call(self, place: Place) -> dict[str, Any]:
        target = self.pick((None, *TEXTS))
        return {"function": self.operand(), "arguments": self.arguments(), "target": target, "result": self.define()}

    def make_closure(self, place: Place) -> dict[str, Any]:
        generator = self.flag()
        parameters = self.signature(generator)
        defaults = tuple(self.operand() for parameter in parameters if parameter.optional)
        inside = Place(forward=True, backward=True, generator=generator, depth=place.depth)
        body = self.region(inside, signature=parameters)
        named = {"name": self.pick(NAMES), "parameters": parameters, "defaults": defaults}
        return {**named, "body": body, "generator": generator, "result": self.define()}

    def make_if(self, place: Place) -> dict[str, Any]:
        condition, count = self.operand(), self.below(3)
        then, orelse = self.inner(place, count), self.inner(place, count)
        return {"condition": condition, "then": then, "orelse": orelse, "results": self.defines(count)}

    def defines(self, count: int) -> tuple[Value, ...]:
        return tuple(self.define() for _ in range(count))

    def make_for(self, place: Place) -> dict[str, Any]:
        count = self.below(3)
        held = {"iterable": self.operand(), "initial": self.merges(count), "together": self.flag()}
        inside = replace(place, loop=count, yields=None, needed=count, together=held["together"])
        body = self.region(inside, 1 + count)
        orelse = self.inner(place, count, count) if self.flag() else None
        return {**held, "body": body, "orelse": orelse, "results": self.defines(count)}

    def make_postponed(self, place: Place) -> dict[str, Any]:
        inside = replace(place, depth=place.depth + 1, strand=True)
        return {"reached": self.operand(), "body": self.within(inside, loop=None)}

    def make_while(self, place: Place) -> dict[str, Any]:
        count = self.below(3)
        initial = self.merges(count)
        condition = self.region(replace(place, loop=None, yields=1 + count, needed=1 + count), count)
        body = self.region(replace(place, loop=count, yields=None, needed=count), count)
        orelse = self.inner(place, count, count) if self.flag() else None
        rest = {"body": body, "orelse": orelse, "results": self.defines(count)}
        return {"initial": initial, "condition": condition, **rest}

    def make_try(self, place: Place) -> dict[str, Any]:
        def handler() -> Handler:
            types = self.inner(place, 1, loop=None) if self.flag() else None
            return Handler(types, self.inner(place, 0, 1))

        body, handlers = self.inner(place), self.many(handler)
        orelse = self.inner(place) if self.flag() else None
        finalizer = self.inner(place) if self.flag() or not handlers else None
        return {"body": body, "handlers": handlers, "orelse": orelse, "finalizer": finalizer}

    def make_stage(self, place: Place) -> dict[str, Any]:
        inner = Maker(self.random.getrandbits(32), 1 + self.size // 2)
        return {"needs": self.pick(STRINGS), "program": inner.program("stage"), "result": self.define()}

    def make_edit(self, place: Place) -> dict[str, Any]:
        held = {"model": self.operand(), "arguments": self.arguments()}
        before = len(self.visible)
        results = (self.define(), self.define())
        body = self.region(Place(forward=True, depth=place.depth))
        assert self.visible[: before + 2] == [*self.visible[:before], *results]
        return {**held, "results": results, "body": body}

    def make_forward(self, place: Place) -> dict[str, Any]:
        method = self.pick(("trace", "generate", "scan"))
        base = {"base": self.operand(), "replays": self.operand()} if self.flag() else {}
        held = {"model": self.operand(), "method": method, "arguments": self.arguments(), "result": self.define()}
        held |= base
        body = self.within(place, forward=True)
        placed = bool(body.ops) and isinstance(body.ops[-1], ops.At)
        return {**held, "body": body, "stops": placed and method != "generate" and self.flag()}

    def make_strands(self, place: Place) -> dict[str, Any]:
        inside = replace(place, depth=place.depth + 1, strand=True)
        strands = self.many(lambda: ops.Strand(self.below(3), self.within(inside, loop=None), span=self.span()))
        return {"body": Region((), strands)}

    def make_steps(self, place: Place) -> dict[str, Any]:
        held = {"tracer": self.operand(), "start": self.operand(), "stop": self.operand()}
        held |= {"asked": self.flag(), "rows": self.operand() if self.flag() else None}
        return {**held, "body": self.region(replace(place, yields=0, needed=0), 1, closed=False)}

    def program(self, kind: Any = None) -> Program:
        kind = kind or self.pick(("experiment", "block", "function", "edit"))
        parameters = (Parameter(self.builder.fresh("model"), "positional_only"), *self.signature())
        exports = self.many(lambda: str(self.pick(TEXTS))) if kind == "block" else ()
        anywhere = kind in ("function", "edit")
        place = Place(forward=anywhere, backward=anywhere, exports=len(exports))
        body = self.region(place, signature=parameters, closed=False)
        if exports:
            end = (ops.Return(self.returned(place)),)
            kept = body.ops[:-1] if body.ops and isinstance(body.ops[-1], ops.TERMINATORS) else body.ops
            body = Region((), (*kept, *end))
        return Program(
            name=self.pick(NAMES),
            parameters=parameters,
            body=body,
            kind=kind,
            target=self.pick(("", "GPT2LMHeadModel", "a b", "a.b")),
            given=self.many(lambda: str(self.pick(TEXTS))),
            passes=self.many(lambda: str(self.pick(("specialise", "place", "two words")))),
            exports=exports,
            span=self.span(),
        )


SIMPLE = (
    ops.Global, ops.SetGlobal, ops.Cell, ops.Load, ops.Store, ops.Bound, ops.Import, ops.Attribute, ops.SetAttribute,
    ops.Item, ops.SetItem, ops.Delete, ops.Build, ops.Format, ops.Unpack, ops.Operator, ops.Call, ops.Save,
    ops.Cache, ops.Captured, ops.Track, ops.Gradients, ops.Prefix, ops.Release,
)  # fmt: skip
MERGES = {(ops.Cell, "initial"), (ops.Store, "value"), (ops.Bound, "value")}
NESTED = (ops.Closure, ops.If, ops.For, ops.While, ops.Try, ops.With, ops.Forward, ops.Session, ops.Backward)
NESTED += (ops.Stage, ops.Edit, ops.Strands)


@st.composite
def _programs(draw: DrawFn) -> Program:
    return Maker(draw(st.integers(0, 2**32)), draw(st.integers(0, 9))).program()


@pytest.fixture(scope="session")
def programs() -> SearchStrategy[Program]:
    """The strategy; a fixture because test modules cannot import each other."""
    return _programs()
