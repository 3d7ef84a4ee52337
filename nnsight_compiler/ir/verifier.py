"""Checks that a program is well formed: what every pass may rely on, and must keep.

The rules, op by op, are listed in `docs/ir.md`. The verifier stops at the first op that breaks one, since a broken
program is a mistake of ours or a damaged file, never the user's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn, assert_never, cast, final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.ops import ALL_OPS, TERMINATORS, TRANSPARENT, AnyOp, Argument, Element, Op, Parameter, Region
from nnsight_compiler.ir.printer import print_op, print_operand, print_type
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.schema import conforms, schema
from nnsight_compiler.ir.syntax import ARITHMETIC, BINARY, UNARY
from nnsight_compiler.ir.tokens import MAX_NESTING
from nnsight_compiler.ir.traverse import defined, operands, regions, used
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Tuple, Unbound, Value

_LITERALS = frozenset({type(None), bool, int, float, complex, str, bytes, type(...)})
_RANKS = ("positional_only", "positional_or_keyword", "var_positional", "keyword_only", "var_keyword")


def verify(program: Program) -> None:
    """Raises `IRError`, naming the op and the rule, unless the program is well formed."""
    _Verifier(program).check(1)


@final
@dataclass(frozen=True, slots=True)
class _Place:
    """What the regions around an op allow.

    loop: how many values the nearest loop carries. yields: how many values a `yield` hands over here. Both `None` where
    there is none. forward, backward: whether ops of a forward, or of a backward pass, may stand here. closure: whether
    a closure is around. strands: whether this is the region of a `strands`. together: whether it is that of a loop
    whose rounds run together.
    """

    loop: int | None = None
    yields: int | None = None
    forward: bool = False
    backward: bool = False
    closure: bool = False
    generator: bool = False
    strands: bool = False
    together: bool = False
    depth: int = 1


class _Verifier:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.defined: dict[str, Value] = {}
        self.visible: set[str] = set()

    def check(self, depth: int) -> None:
        program = self.program
        for name, hint in schema(Program).items():
            if not conforms(getattr(program, name), hint):
                self.fail(None, f"the field `{name}` holds {getattr(program, name)!r:.80}")
        self.signature(None, program.parameters)
        anywhere = program.kind in ("function", "edit")
        place = _Place(forward=anywhere, backward=anywhere, depth=depth)
        self.region(None, program.body, place, 0, signature=program.parameters)
        if program.exports and program.kind != "block":
            self.fail(None, "only a block has exports")
        if program.exports and not _jumps(program.body):
            self.fail(None, "a block with exports must end in a `return` of them")

    def fail(self, op: Op | None, reason: str, printed: bool = True) -> NoReturn:
        if op is None:
            raise IRError(f"{self.program.span}: {self.program.kind} {self.program.name!r}: {reason}")
        shown = print_op(op) if printed else type(op).__name__
        raise IRError(f"{op.span}: {reason}\n    {shown}")

    # --- regions ---

    def region(
        self,
        owner: Op | None,
        region: Region,
        place: _Place,
        parameters: int,
        needed: int = 0,
        signature: tuple[Parameter, ...] = (),
    ) -> None:
        """Checks a region that takes so many parameters, or those of a signature, and must hand over so many values."""
        if place.depth > MAX_NESTING:
            self.fail(owner, f"regions are nested more than {MAX_NESTING} deep")
        if not (isinstance(region.parameters, tuple) and isinstance(region.ops, tuple)):
            self.fail(owner, "a region's parameters and ops are tuples")
        if len(region.parameters) != parameters:
            self.fail(owner, f"a region takes {parameters} parameters here, not {len(region.parameters)}")
        before = None if isinstance(owner, TRANSPARENT) else set(self.visible)
        for value in (*region.parameters, *(parameter.value for parameter in signature)):
            self.define(owner, value)
        for number, op in enumerate(region.ops, start=1):
            if isinstance(op, TERMINATORS) and number < len(region.ops):
                self.fail(op, "code follows what ends its region")
            self.op(op, replace(place, depth=place.depth + 1))
        if needed and not (region.ops and (isinstance(region.ops[-1], ops.Yield) or _jumps(region))):
            self.fail(owner, f"a region falls off its end, where it must hand over {needed} values")
        if before is not None:
            self.visible = before

    def op(self, op: Op, place: _Place) -> None:
        if type(op) not in ALL_OPS:
            raise IRError(f"{type(op).__name__} is no op of the IR")
        for name, hint in schema(type(op)).items():
            if not conforms(getattr(op, name), hint):
                self.fail(op, f"the field `{name}` holds {getattr(op, name)!r:.80}", printed=False)
        self.operands(op, place)
        inside = isinstance(op, (*TRANSPARENT, ops.Edit))
        if inside:
            self.results(op)
        self.rules(cast(AnyOp, op), place)
        if not inside:
            self.results(op)

    def results(self, op: Op) -> None:
        for value in defined(op):
            self.define(op, value)

    def define(self, op: Op | None, value: Value) -> None:
        if not conforms(value, Value) or not value.name:
            self.fail(op, "a value has no name", printed=False)
        if value.name in self.defined:
            self.fail(op, f"{value} is defined twice")
        self.defined[value.name] = value
        self.visible.add(value.name)

    # --- operands ---

    def operands(self, op: Op, place: _Place) -> None:
        found = [leaf for operand in operands(op) for leaf in self.leaves(op, operand)]
        allowed = [operand for operand in self.may_be_unbound(op, place) if isinstance(operand, Unbound)]
        if sum(isinstance(leaf, Unbound) for leaf in found) > len(allowed):
            self.fail(
                op, "`unbound` may stand only where paths merge: in a terminator, a loop's start, a cell, `bound`"
            )
        for leaf in found:
            if isinstance(leaf, Literal) and type(leaf.value) not in _LITERALS:
                self.fail(op, f"{type(leaf.value).__name__} is no type of a literal", printed=False)
        for value in used(op):
            if value.name not in self.visible:
                elsewhere = "not visible here" if value.name in self.defined else "not defined before it"
                self.fail(op, f"{value} is {elsewhere}")
            if self.defined[value.name].type != value.type:
                known = print_type(self.defined[value.name].type)
                self.fail(op, f"{value} is {print_type(value.type)} here, and {known} where it is defined")

    def leaves(self, op: Op, operand: Operand, depth: int = 1) -> list[Operand]:
        """The operands without parts that an operand is made of."""
        if depth > MAX_NESTING:
            self.fail(op, f"operands are nested more than {MAX_NESTING} deep", printed=False)
        match operand:
            case Tuple(parts=parts):
                return [leaf for part in parts for leaf in self.leaves(op, part, depth + 1)]
            case Slice(lower=lower, upper=upper, step=step):
                return [leaf for part in (lower, upper, step) for leaf in self.leaves(op, part, depth + 1)]
            case _ if conforms(operand, Value | Literal | Unbound | Module):
                return [operand]
            case _:
                self.fail(op, f"{operand!r:.80} is no operand", printed=False)

    def may_be_unbound(self, op: Op, place: _Place) -> tuple[Operand, ...]:
        match op:
            case ops.Yield(values=values) | ops.Break(values=values) | ops.Continue(values=values):
                return values
            case ops.For(initial=initial) | ops.While(initial=initial):
                return initial
            case ops.Cell(initial=value) | ops.Store(value=value) | ops.Bound(value=value):
                return (value,)
            case ops.Return(value=Tuple(parts=parts)) if self.program.kind in ("block", "stage") and not place.closure:
                return parts
            case _:
                return ()

    # --- the rules of each op ---

    def rules(self, op: AnyOp, place: _Place) -> None:
        in_round, place = place.together, replace(place, together=False)
        inside = replace(place, yields=0)
        match op:
            case (
                ops.Global() | ops.SetGlobal() | ops.Cell() | ops.Load() | ops.Store() | ops.Bound() | ops.Attribute()
                | ops.SetAttribute() | ops.Item() | ops.SetItem() | ops.Format() | ops.Save() | ops.FromEnd()
                | ops.Cache() | ops.Track()
            ):  # fmt: skip
                pass
            case ops.Import(module=module, name=name, level=level, leaf=leaf):
                if level < 0 or (name is None and (level or not module)) or not (level or module) or (leaf and name):
                    self.fail(op, "no import statement says this", printed=False)
            case ops.Delete(index=index, name=name):
                if (index is None) == (name is None):
                    self.fail(op, "either an index or a name is deleted", printed=False)
            case ops.Build(kind=kind, elements=elements):
                if not all(_fits(element, kind) for element in elements):
                    self.fail(op, "`key: value` and `**value` stand in a dict, and nothing else does")
            case ops.Unpack(results=results, star=star):
                if not -1 <= star < len(results):
                    self.fail(op, f"there is no result number {star}")
            case ops.Operator():
                self.operator(op)
            case ops.Call(arguments=arguments):
                self.arguments(op, arguments)
            case ops.Closure(parameters=parameters, defaults=defaults, body=body, generator=generator):
                self.closure(op, parameters, len(defaults))
                # Where a closure is called is not known here, and so whether a forward is around it then.
                anywhere = _Place(None, None, True, True, True, generator, depth=place.depth)
                self.region(op, body, anywhere, 0, 0, parameters)
            case ops.Stage(program=program):
                if program.kind != "stage":
                    self.fail(op, f"it holds a program of the kind `{program.kind}`")
                _Verifier(program).check(place.depth)
            case ops.If(results=results, then=then, orelse=orelse):
                for region in (then, orelse):
                    self.region(op, region, replace(place, yields=len(results)), 0, len(results))
            case ops.For(results=results, initial=initial, body=body, orelse=otherwise):
                self.loop(op, results, initial)
                count = len(results)
                rounds = replace(place, loop=count, yields=None, together=op.together)
                self.region(op, body, rounds, 1 + count, count)
                self.otherwise(op, otherwise, count, place)
            case ops.While(results=results, initial=initial, condition=condition, body=body, orelse=otherwise):
                self.loop(op, results, initial)
                count = len(results)
                self.region(op, condition, replace(place, loop=None, yields=1 + count), count, 1 + count)
                self.region(op, body, replace(place, loop=count, yields=None), count, count)
                self.otherwise(op, otherwise, count, place)
            case ops.Try(body=body, handlers=handlers, orelse=otherwise, finalizer=finalizer):
                self.region(op, body, inside, 0)
                for handler in handlers:
                    if handler.types is not None:
                        self.region(op, handler.types, replace(place, loop=None, yields=1), 0, 1)
                    self.region(op, handler.body, inside, 1)
                for rest in (otherwise, finalizer):
                    if rest is not None:
                        self.region(op, rest, inside, 0)
                if not handlers and finalizer is None:
                    self.fail(op, "a `try` has a handler or a `finally`")
            case ops.With(body=body):
                self.region(op, body, inside, 0)
            case ops.Yield(values=values):
                self.hands_over(op, len(values), place.yields, "region to hand values to")
            case ops.Break(values=values) | ops.Continue(values=values):
                self.hands_over(op, len(values), place.loop, "loop around it")
            case ops.Emit():
                if not place.generator:
                    self.fail(op, "`emit` stands in a generator only")
            case ops.Return(value=value):
                self.returned(op, value, place)
            case ops.Raise(exception=exception, cause=cause):
                if exception is None and cause is not None:
                    self.fail(op, "a cause without an exception")
            case ops.Forward(arguments=arguments, body=body, stops=stops):
                self.arguments(op, arguments)
                if stops and (op.method == "generate" or ops.last_site(op) is None):
                    self.fail(op, "a forward stops after a site, and a generation does not")
                self.region(op, body, replace(inside, forward=True), 0)
            case ops.Postponed(body=body):
                self.within(op, in_round, "loop whose rounds run together")
                if _returns(body):
                    self.fail(op, "what is postponed does not leave the program")
                self.region(op, body, replace(inside, loop=None), 0)
            case ops.Strands(body=body):
                if not all(isinstance(each, ops.Strand) for each in body.ops):
                    self.fail(op, "its region holds strands, and nothing else")
                self.region(op, body, replace(inside, strands=True), 0)
            case ops.Strand(after=after, body=body):
                if not place.strands or after < 0:
                    self.fail(op, "a strand stands in a `strands`, and waits a number of times")
                if _returns(body):
                    self.fail(op, "a strand does not leave the program")
                self.region(op, body, replace(inside, loop=None, strands=False), 0)
            case ops.Session(arguments=arguments, body=body):
                self.arguments(op, arguments)
                self.region(op, body, inside, 0)
            case ops.Invoke(arguments=arguments, body=body):
                self.within(op, place.forward, "forward")
                self.arguments(op, arguments)
                self.region(op, body, inside, 0)
            case ops.Steps(body=body):
                self.within(op, place.forward, "forward")
                self.region(op, body, inside, 1)
            case ops.Read() | ops.Write() | ops.Skip() | ops.Stop() | ops.Record():
                self.within(op, place.forward, "forward")
            case ops.Backward(arguments=arguments, body=body):
                self.arguments(op, arguments)
                self.region(op, body, replace(inside, backward=True), 0)
            case ops.Grad() | ops.SetGrad():
                self.within(op, place.backward, "backward")
            case ops.AtGradient(body=body):
                self.within(op, place.backward, "backward")
                self.region(op, body, inside, 0)
            case ops.Gradients(arguments=arguments):
                self.arguments(op, arguments)
            case ops.Require():
                self.within(op, place.forward, "forward")
            case ops.Edit(results=results, arguments=arguments, body=body):
                if len(results) != 2:
                    self.fail(op, "an edit gives a tracer and a model")
                self.arguments(op, arguments)
                self.region(op, body, _Place(forward=True, closure=True, depth=place.depth), 0)
            case ops.Captured() | ops.Release():
                pass
            case ops.Prefix(arguments=arguments):
                self.arguments(op, arguments)
            case ops.At(body=body) | ops.Applied(body=body):
                self.within(op, place.forward, "forward")
                self.region(op, body, inside, 0)
            case _:
                assert_never(op)

    def within(self, op: Op, allowed: bool, what: str) -> None:
        if not allowed:
            self.fail(op, f"it stands outside any {what}")

    def hands_over(self, op: Op, count: int, expected: int | None, what: str) -> None:
        if expected is None:
            self.fail(op, f"there is no {what}")
        if count != expected:
            self.fail(op, f"it hands over {count} values, where {expected} are expected")

    def loop(self, op: Op, results: tuple[Value, ...], initial: tuple[Operand, ...]) -> None:
        if len(results) != len(initial):
            self.fail(op, f"it has {len(results)} results and carries {len(initial)} values", printed=False)

    def otherwise(self, op: Op, region: Region | None, count: int, place: _Place) -> None:
        if region is not None:
            self.region(op, region, replace(place, yields=count), count, count)

    def returned(self, op: Op, value: Operand, place: _Place) -> None:
        if place.generator:
            self.fail(op, "a generator does not return")
        exports = self.program.exports
        if exports and not place.closure and not (isinstance(value, Tuple) and len(value.parts) == len(exports)):
            self.fail(op, f"a block returns a tuple of its {len(exports)} exports, not {print_operand(value)}")

    def operator(self, op: ops.Operator) -> None:
        known = ARITHMETIC if op.in_place else {1: UNARY, 2: BINARY}.get(len(op.operands), frozenset())
        if op.operator not in known or (op.in_place and len(op.operands) != 2):
            self.fail(op, f"{op.operator!r} is no operator on {len(op.operands)} operands", printed=False)

    def arguments(self, op: Op, arguments: tuple[Argument, ...]) -> None:
        keywords = [argument.keyword for argument in arguments if argument.keyword is not None]
        if any(argument.keyword is not None and argument.star for argument in arguments):
            self.fail(op, "an argument is either starred or has a keyword")
        if len(set(keywords)) != len(keywords):
            self.fail(op, "a keyword is given twice")

    def closure(self, op: ops.Closure, parameters: tuple[Parameter, ...], defaults: int) -> None:
        self.signature(op, parameters)
        optional = sum(parameter.optional for parameter in parameters)
        if optional != defaults:
            self.fail(op, f"{optional} parameters have a default, and {defaults} defaults are given", printed=False)
        if op.generator and len(parameters) != 1:
            self.fail(op, "a generator has one parameter, its first iterable")

    def signature(self, op: Op | None, parameters: tuple[Parameter, ...]) -> None:
        ranks = [_RANKS.index(parameter.kind) for parameter in parameters]
        stars = [parameter for parameter in parameters if parameter.kind.startswith("var_")]
        positional = [parameter.optional for parameter in parameters if "positional" in parameter.kind.split("_")[0]]
        if (
            ranks != sorted(ranks)
            or len({parameter.kind for parameter in stars}) != len(stars)
            or any(parameter.optional for parameter in stars)
            or positional != sorted(positional)
        ):
            self.fail(op, "no function has these parameters in this order", printed=False)


def _fits(element: Element, kind: str) -> bool:
    if kind == "dict":
        return (element.key is None) == element.starred
    return element.key is None


def _returns(region: Region) -> bool:
    """Whether anything in a region leaves the program or the closure that it stands in."""
    return any(
        isinstance(op, ops.Return) or any(map(_returns, () if isinstance(op, (ops.Closure, ops.Edit)) else regions(op)))
        for op in region.ops
    )


def _jumps(region: Region) -> bool:
    """Whether control never reaches the end of the region, because every path leaves by other ways than `yield`."""
    if not region.ops:
        return False
    last = region.ops[-1]
    match last:
        case ops.If(then=then, orelse=orelse):
            return _jumps(then) and _jumps(orelse)
        case ops.Try(body=body, handlers=handlers, orelse=otherwise, finalizer=finalizer):
            if finalizer is not None and _jumps(finalizer):
                return True
            through = _jumps(body) or (otherwise is not None and _jumps(otherwise))
            return through and all(_jumps(handler.body) for handler in handlers)
        case (
            ops.Forward(body=body)
            | ops.Postponed(body=body)
            | ops.Strands(body=body)
            | ops.Strand(body=body)
            | ops.Session(body=body)
            | ops.Invoke(body=body)
            | ops.Steps(body=body)
            | ops.With(body=body)
            | ops.At(body=body)
            | ops.Applied(body=body)
            | ops.Backward(body=body)
            | ops.AtGradient(body=body)
        ):
            return _jumps(body)
        case _:
            return isinstance(last, TERMINATORS) and not isinstance(last, ops.Yield)
