"""Random programs in IR, as passes may leave them, run as generated Python and by a plain interpreter of the ops.

All values are versions of two names or have none, and any visible value may be used: far from what any source gives.
"""

from __future__ import annotations

import operator
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from random_examples import examples

from nnsight_compiler.ir.ops import (
    Argument,
    Break,
    Build,
    Call,
    Cell,
    Closure,
    Continue,
    Element,
    For,
    Handler,
    If,
    Item,
    Load,
    Op,
    Operator,
    Parameter,
    Region,
    Return,
    SetItem,
    Store,
    Try,
    Unpack,
    While,
    Yield,
)
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.values import Literal, Operand, Tuple, Value
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.runtime.functions import generate_function

LOG, FAIL = Value("log"), Value("fail")
ROUNDS = 30
"""How many effects a run may have before it is stopped."""


class EndlessError(Exception):
    pass


# --- programs ---


class Maker:
    """Draws programs. Values are integers, lists of integers, and functions without arguments."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.count = 0
        self.nested = 0

    def fresh(self) -> Value:
        self.count += 1
        stem = self.random.choice(["x", "x", "y", ""])
        return Value(f"{stem}.{self.count}" if stem else str(self.count))

    def number(self, visible: dict[str, list[Value]]) -> Operand:
        return self.random.choice([*visible["number"], *visible["number"][-2:], Literal(self.random.randrange(4))])

    def program(self) -> Program:
        parameters = [Value("x"), Value("y")]
        visible = {"number": [*parameters], "list": [], "function": []}
        ops = self.ops(visible, 3, None, 6)
        if not isinstance(ops[-1], Return):
            ops.append(self.returning(visible))
        return Program("f", tuple(map(Parameter, (LOG, FAIL, *parameters))), Region((), tuple(ops)), kind="function")

    def returning(self, visible: dict[str, list[Value]]) -> Return:
        if self.nested:
            return Return(self.number(visible))
        return Return(Tuple((*visible["number"][-4:], *visible["list"][-2:])))

    def region(
        self, outer: dict[str, list[Value]], depth: int, loop: int | None, end: type[Op] | None, count: int = 0,
        parameters: tuple[Value, ...] = (), carried: tuple[Value, ...] = (),
    ) -> Region:  # fmt: skip
        visible = {kind: list(values) for kind, values in outer.items()}
        visible["number"] += [*parameters, *carried]
        ops = self.ops(visible, depth, loop, 4)
        if not isinstance(ops[-1], Return | Break | Continue) and end is not None:
            ops.append(end(tuple(self.number(visible) for _ in range(count))))  # type: ignore[call-arg]
        return Region((*parameters, *carried), tuple(ops))

    def ops(self, visible: dict[str, list[Value]], depth: int, loop: int | None, most: int) -> list[Op]:
        found: list[Op] = []
        for _ in range(self.random.randrange(1, most + 1)):
            found += self.op(visible, depth, loop)
            if isinstance(found[-1], Return | Break | Continue):
                break
        return found

    def op(self, visible: dict[str, list[Value]], depth: int, loop: int | None) -> list[Op]:
        random, result = self.random, self.fresh()
        one, two = self.number(visible), self.number(visible)
        kind = random.randrange(20 if depth else 10)
        if kind < 10:
            visible_kind = "list" if kind == 3 else "number"
            made: list[Op] = []
            match kind:
                case 0 | 1 | 2:
                    made = [Operator(result, random.choice("+-"), (one, two), in_place=random.random() < 0.2)]
                case 3:
                    made = [Build(result, "list", (Element(one), Element(two)))]
                case 4 | 5:
                    made = [Call(result, random.choice([LOG, FAIL]), (Argument(one),))]
                case 6 if visible["list"]:
                    held = random.choice(visible["list"])
                    made = [Item(result, held, Literal(-1))]
                    if random.random() < 0.5:
                        made.append(SetItem(held, Literal(0), two))
                    if random.random() < 0.3:
                        grown, more = self.fresh(), self.fresh()
                        made.append(Build(more, "list", (Element(one),)))
                        made.append(Operator(grown, "+", (held, more), in_place=True))
                        visible["list"].append(grown)
                case 7:
                    other = self.fresh()
                    made = [Unpack((result, other), Tuple((one, two)))]
                    visible["number"].append(other)
                case 8 if visible["function"]:
                    made = [Call(result, random.choice(visible["function"]), ())]
                case 9 if random.random() < 0.5:
                    end = random.choice([Return] if loop is None else [Break, Continue, Continue, Return])
                    if end is Return:
                        return [self.returning(visible)]
                    return [end(tuple(self.number(visible) for _ in range(loop or 0)))]
                case _:
                    made = [Operator(result, "+", (one, Literal(1)))]
            visible[visible_kind].append(result)
            return made
        count = random.randrange(3)
        results = tuple(self.fresh() for _ in range(count))
        initial = tuple(self.number(visible) for _ in range(count))
        if kind < 13:
            sides = [self.region(visible, depth - 1, loop, Yield, count) for _ in range(2)]
            visible["number"] += results
            return [If(results, one, *sides)]
        if kind < 17:
            carried = [tuple(self.fresh() for _ in range(count)) for _ in range(3)]
            orelse = None
            if random.random() < 0.4:
                orelse = self.region(visible, depth - 1, loop, Yield, count, (), carried[2])
            if kind < 15:
                item = self.fresh()
                body = self.region(visible, depth - 1, count, Continue, count, (item,), carried[0])
                made = [For(results, Tuple((one, two, Literal(3))), initial, body, orelse)]
            else:
                test = self.region(visible, 0, None, Yield, count + 1, (), carried[0])
                effect = Call(self.fresh(), LOG, (Argument(one),))
                ops = [op for op in test.ops if not isinstance(op, Return | Yield)]
                passed = Yield(tuple(random.choice([one, two, *carried[0]]) for _ in range(count + 1)))
                test = Region(
                    test.parameters, (effect, *ops, passed if isinstance(test.ops[-1], Return) else test.ops[-1])
                )
                body = self.region(visible, depth - 1, count, Continue, count, (), carried[1])
                made = [While(results, initial, test, body, orelse)]
            visible["number"] += results
            return made
        if kind < 19:
            body = self.region(visible, depth - 1, loop, None)
            handling = self.region(visible, depth - 1, loop, None)
            handlers = (Handler(None, Region((self.fresh(),), handling.ops)),)
            finalizer = self.region(visible, depth - 1, loop, None) if random.random() < 0.6 else None
            if finalizer is not None and random.random() < 0.4:
                handlers = ()
            return [Try(body, handlers, None, finalizer)]
        if random.random() < 0.5:
            cell, loaded = self.fresh(), self.fresh()
            visible["number"] += [loaded]
            return [Cell(cell, "c", one), Store(cell, two), Load(loaded, cell, "c")]
        parameter = self.fresh()
        self.nested += 1
        body = self.region({**visible, "number": [*visible["number"], parameter]}, depth - 1, None, None)
        self.nested -= 1
        if not isinstance(body.ops[-1], Return):
            body = Region((), (*body.ops, Return(self.number(visible))))
        visible["function"].append(result)
        return [Closure(result, "g", (Parameter(parameter, optional=True),), (two,), body)]


# --- the interpreter ---


class JumpError(BaseException):
    """Control that leaves a region by `break`, `continue` or `return`."""

    def __init__(self, op: Op, values: Any) -> None:
        self.op, self.values = op, values


class Machine:
    """Runs ops one by one; every value is an entry of `values`, which nested functions copy when they are made."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def get(self, operand: Operand) -> Any:
        match operand:
            case Value(name=name):
                return self.values[name]
            case Literal(value=value):
                return value
            case Tuple(parts=parts):
                return tuple(map(self.get, parts))
        raise AssertionError(operand)

    def all(self, operands: tuple[Operand, ...]) -> list[Any]:
        return [self.get(operand) for operand in operands]

    def set(self, values: tuple[Value, ...], held: list[Any]) -> None:
        self.values.update({value.name: each for value, each in zip(values, held, strict=True)})

    def region(self, region: Region, given: list[Any] | None = None) -> list[Any]:
        self.set(region.parameters, given or [])
        for op in region.ops:
            if isinstance(op, Yield):
                return self.all(op.values)
            self.op(op)
        return []

    def op(self, op: Op) -> None:
        match op:
            case Operator(result=result, operator=sign, operands=(left, right), in_place=in_place):
                plain = {"+": operator.add, "-": operator.sub}
                changing = {"+": operator.iadd, "-": operator.isub}
                self.set((result,), [(changing if in_place else plain)[sign](self.get(left), self.get(right))])
            case Build(result=result, elements=elements):
                self.set((result,), [[self.get(element.value) for element in elements]])
            case Call(result=result, function=function, arguments=arguments):
                self.set((result,), [self.get(function)(*[self.get(argument.value) for argument in arguments])])
            case Item(result=result, object=held, index=index):
                self.set((result,), [self.get(held)[self.get(index)]])
            case SetItem(object=held, index=index, value=value):
                self.get(held)[self.get(index)] = self.get(value)
            case Unpack(results=results, value=value):
                self.set(results, list(self.get(value)))
            case Cell(result=result, initial=value):
                self.set((result,), [[self.get(value)]])
            case Store(cell=cell, value=value):
                self.get(cell)[0] = self.get(value)
            case Load(result=result, cell=cell):
                self.set((result,), [self.get(cell)[0]])
            case If(results=results, condition=condition, then=then, orelse=orelse):
                self.set(results, self.region(then if self.get(condition) else orelse))
            case For(results=results, iterable=iterable, initial=initial):
                self.set(results, self.loop(op, [[each] for each in self.get(iterable)], self.all(initial)))
            case While(results=results, initial=initial):
                self.set(results, self.loop(op, None, self.all(initial)))
            case Try():
                self.guarded(op)
            case Closure(result=result):
                self.set((result,), [self.function(op, dict(self.values), self.all(op.defaults))])
            case Break(values=values) | Continue(values=values):
                raise JumpError(op, self.all(values))
            case Return(value=value):
                raise JumpError(op, self.get(value))
            case _:
                raise AssertionError(op)

    def loop(self, op: For | While, items: list[list[Any]] | None, carried: list[Any]) -> list[Any]:
        while True:
            if isinstance(op, While):
                test, *carried = self.region(op.condition, carried)
                given = [] if test else None
            else:
                assert items is not None
                given = items.pop(0) if items else None
            if given is None:
                return carried if op.orelse is None else self.region(op.orelse, carried)
            try:
                self.region(op.body, [*given, *carried])
            except JumpError as jump:
                if isinstance(jump.op, Return):
                    raise
                carried = jump.values
                if isinstance(jump.op, Break):
                    return carried

    def guarded(self, op: Try) -> None:
        try:
            try:
                self.region(op.body)
            except Exception as error:
                if not op.handlers:
                    raise
                self.region(op.handlers[0].body, [error])
        finally:
            if op.finalizer is not None:
                self.region(op.finalizer)

    @staticmethod
    def function(op: Closure, values: dict[str, Any], defaults: list[Any]) -> Any:
        def function() -> Any:
            machine = Machine(dict(values))
            machine.set(tuple(parameter.value for parameter in op.parameters), defaults)
            return run(machine, op.body)

        return function


def run(machine: Machine, region: Region) -> Any:
    try:
        machine.region(region)
    except JumpError as jump:
        return jump.values
    return None


# --- the property ---


def outcome(function: Any, x: int, y: int) -> Any:
    happened: list[int] = []

    def log(value: int) -> int:
        if len(happened) > ROUNDS:
            raise EndlessError
        happened.append(value)
        return value

    def fail(value: int) -> int:
        log(-value)
        if value % 3 == 2:
            raise ValueError(value)
        return value

    try:
        return repr(function(log, fail, x, y)), happened
    except (ValueError, EndlessError) as error:
        return repr(error), happened


@examples(60)
@given(st.randoms(use_true_random=False))
def test_generated_python_does_what_the_ops_say(random: Random) -> None:
    program = Maker(random).program()
    verify(program)
    made = generate_function(program, {})
    for x, y in ((0, 1), (2, 5), (7, 3)):

        def interpreted(log: Any, fail: Any, x: int, y: int) -> Any:
            return run(Machine({"log": log, "fail": fail, "x": x, "y": y}), program.body)

        assert outcome(made, x, y) == outcome(interpreted, x, y), f"{program}\n{made.__source__}"  # type: ignore[attr-defined]
