"""Random programs, run by a small interpreter: passes must not change what they do, nor memory claim too little.

The interpreter gives the ops their plain meaning in the order of the source. The sites of its model share storage, as
those of a real one do: the input of one layer is the output of the layer before.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import examples

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import Argument, Element, Op, Parameter, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import definitions
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Tuple, Value
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.eliminate_common_subexpressions import eliminate_common_subexpressions
from nnsight_compiler.passes.eliminate_dead_saves import eliminate_dead_saves
from nnsight_compiler.passes.known_calls import known_method
from nnsight_compiler.passes.memory import Memory

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
IN_PLACE = {"+": operator.iadd, "-": operator.isub, "*": operator.imul}
METHODS = ("relu", "clone", "t", "reshape", "float", "relu_", "zero_", "add_", "sum", "contiguous", "unbind")
MODEL, TENSOR, OUTER, FLAG = (Value(name) for name in ("model", "tensor", "outer", "flag"))


class Generator:
    """Makes a random program, well formed and free of errors when it runs."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.builder = Builder(["model", "tensor", "outer", "flag"])
        self.tensors = [TENSOR]
        self.lists = [OUTER]

    def program(self) -> Program:
        tracer = self.builder.fresh("f")
        with self.builder.region() as body:
            self.ops(self.random.randint(3, 14), 2)
        self.builder.emit(ops.Forward(tracer, MODEL, "trace", (), Region((), tuple(body))))
        self.ops(self.random.randint(0, 3), 0)
        kept = self.random.choices(self.tensors + self.lists, k=self.random.randint(1, 3))
        self.builder.emit(ops.Return(Tuple(tuple(kept))))
        parameters = tuple(Parameter(value) for value in (MODEL, TENSOR, OUTER, FLAG))
        return Program("f", parameters, Region((), tuple(self.builder.ops)))

    def ops(self, count: int, depth: int) -> None:
        kinds = ["item", "operator", "method", "list", "append", "part", "save", "set_item", "in_place"]
        if depth:
            kinds += ["read", "read", "read", "write", "skip_nothing", "if", "for"]
        for _ in range(count):
            kind = self.random.choice(kinds)
            getattr(self, kind, self.read)(depth) if depth or kind != "read" else None

    def tensor(self) -> Value:
        return self.random.choice(self.tensors)

    def result(self, op: Callable[[Value], Op]) -> None:
        value = self.builder.fresh()
        self.builder.emit(op(value))
        self.tensors.append(value)

    def read(self, depth: int) -> None:
        module, port = self.random.choice([("a", "output"), ("b", "input"), ("b", "output")])
        self.result(lambda value: ops.Read(value, Module(MODEL, module), port))  # type: ignore[arg-type]

    def write(self, depth: int) -> None:
        module = self.random.choice("ab")
        self.builder.emit(ops.Write(Module(MODEL, module), "output", self.tensor()))

    def item(self, depth: int) -> None:
        index = self.random.choice([Slice(), Tuple((Slice(), Slice(Literal(0), Literal(3)))), Literal(...)])
        self.result(lambda value: ops.Item(value, self.tensor(), index))

    def operator(self, depth: int) -> None:
        sign = self.random.choice(list(OPERATORS))
        other: Operand = self.random.choice([Literal(2.0), self.tensor()])
        self.result(lambda value: ops.Operator(value, sign, (self.tensor(), other)))

    def in_place(self, depth: int) -> None:
        sign = self.random.choice(list(IN_PLACE))
        self.result(lambda value: ops.Operator(value, sign, (self.tensor(), Literal(2.0)), in_place=True))

    def method(self, depth: int) -> None:
        name = self.random.choice(METHODS)
        arguments = {"reshape": (Literal(3), Literal(3)), "add_": (Literal(1.0),), "sum": (Literal(0), Literal(True))}
        method, result = self.builder.fresh("m"), self.builder.fresh()
        self.builder.emit(ops.Attribute(method, self.tensor(), name))
        known = known_method(name)
        assert known is not None
        given = tuple(map(Argument, arguments.get(name, ())))
        self.builder.emit(ops.Call(result, method, given, known.target))
        if name == "unbind":
            row, part = self.builder.fresh("row"), self.builder.fresh()
            self.builder.emit(ops.Item(row, result, Literal(0)))
            self.builder.emit(ops.Operator(part, "+", (self.tensor(), row)))
            self.tensors.append(part)
        elif name != "sum":
            self.tensors.append(result)

    def list(self, depth: int) -> None:
        value = self.builder.fresh("l")
        self.builder.emit(ops.Build(value, "list", tuple(Element(self.tensor()) for _ in range(2))))
        self.lists.append(value)

    def append(self, depth: int) -> None:
        method, result = self.builder.fresh("m"), self.builder.fresh()
        self.builder.emit(ops.Attribute(method, self.random.choice(self.lists), "append"))
        self.builder.emit(ops.Call(result, method, (Argument(self.tensor()),), "method.append"))

    def part(self, depth: int) -> None:
        self.result(lambda value: ops.Item(value, self.random.choice(self.lists), Literal(0)))

    def save(self, depth: int) -> None:
        self.result(lambda value: ops.Save(value, self.tensor()))

    def set_item(self, depth: int) -> None:
        target: Value = self.random.choice([self.tensor(), self.random.choice(self.lists)])
        index: Operand = Literal(0)
        if target in self.tensors:
            index = Slice()
        self.builder.emit(ops.SetItem(target, index, self.tensor()))

    def closed(self, depth: int, last: Callable[[Value], Op], parameters: tuple[Value, ...] = ()) -> Region:
        tensors, lists = list(self.tensors), [*self.lists]
        self.tensors += parameters
        with self.builder.region() as body:
            self.ops(self.random.randint(1, 4), depth - 1)
            self.builder.emit(last(self.tensor()))
        self.tensors, self.lists = tensors, lists
        return Region(parameters, tuple(body))

    def if_(self, depth: int) -> None:
        then, orelse = (self.closed(depth, lambda value: ops.Yield((value,))) for _ in range(2))
        self.result(lambda value: ops.If((value,), FLAG, then, orelse))

    def for_(self, depth: int) -> None:
        item, carried = self.builder.fresh("item"), self.builder.fresh("carried")
        body = self.closed(depth, lambda value: ops.Continue((value,)), (item, carried))
        iterable = Tuple((self.tensor(), self.tensor()))
        self.result(lambda value: ops.For((value,), iterable, (self.tensor(),), body))


setattr(Generator, "if", Generator.if_)
setattr(Generator, "for", Generator.for_)


class Interpreter:
    """Runs a program on tensors; with a `memory`, checks its claims against what each op does."""

    def __init__(self, flag: bool, memory: Memory | None = None) -> None:
        torch.manual_seed(0)
        stream = torch.rand(3, 3)
        self.tensor, self.outer = torch.rand(3, 3), [torch.rand(3, 3)]
        # The output of `a` is the input of `b`, which works in place.
        self.sites: dict[tuple[str, str], Any] = {("a", "output"): stream, ("b", "input"): stream.view(3, 3)}
        self.sites["b", "output"] = stream[:]
        self.values: dict[str, Any] = {"model": None, "tensor": self.tensor, "outer": self.outer, "flag": flag}
        self.memory = memory
        self.returned: Any = None

    def run(self, program: Program) -> Interpreter:
        self.region(program.body)
        return self

    def outcome(self) -> Any:
        """All that can be seen afterwards: what is returned and how it shares storage, the arguments, the model."""
        seen = [self.returned, self.tensor, self.outer, list(self.sites.values())]
        places: dict[int, int] = {}
        return _described(seen, places)

    def get(self, operand: Operand) -> Any:
        match operand:
            case Value(name=name):
                return self.values[name]
            case Literal(value=value):
                return value
            case Slice(lower=lower, upper=upper, step=step):
                return slice(self.get(lower), self.get(upper), self.get(step))
            case Tuple(parts=parts):
                return tuple(map(self.get, parts))
        raise AssertionError(operand)

    def region(self, region: Region) -> Op | None:
        """Runs the ops; gives back the terminator."""
        for op in region.ops:
            before = {name: _contents(value) for name, value in self.values.items()} if self.memory else {}
            last = self.op(op)
            made = {value.name for value in [*definitions(Region((), (op,)))]}
            for name, contents in before.items():
                if self.memory and name not in made and _contents(self.values[name]) != contents:
                    writes = self.memory.writes(op)
                    assert self.memory.overlap(writes, self.memory.reachable(Value(name))), f"{op} writes %{name}"
            if last is not None:
                return last
        return None

    def op(self, op: Op) -> Op | None:
        match op:
            case ops.Forward(body=body):
                self.values[op.result.name] = None
                self.region(body)
            case ops.Read(result=result, module=Module(path=path), port=port):
                self.values[result.name] = self.sites[path, port]
            case ops.Write(module=Module(path=path), port=port, value=value):
                self.sites[path, port] = self.get(value)
            case ops.Item(result=result, object=base, index=index):
                self.values[result.name] = self.get(base)[self.get(index)]
            case ops.SetItem(object=base, index=index, value=value):
                stored = self.get(value)
                # Torch refuses to copy between views that overlap.
                self.get(base)[self.get(index)] = stored if isinstance(self.get(base), list) else stored.clone()
            case ops.Attribute(result=result, object=base, name=name):
                self.values[result.name] = getattr(self.get(base), name)
            case ops.Call(result=result, function=function, arguments=arguments):
                self.values[result.name] = self.get(function)(*(self.get(each.value) for each in arguments))
            case ops.Operator(result=result, operator=sign, operands=operands, in_place=in_place):
                self.values[result.name] = (IN_PLACE if in_place else OPERATORS)[sign](*map(self.get, operands))
            case ops.Build(result=result, elements=elements):
                self.values[result.name] = [self.get(each.value) for each in elements]
            case ops.Save(result=result, value=value):
                self.values[result.name] = self.get(value).clone()
            case ops.If(results=results, condition=condition, then=then, orelse=orelse):
                last = self.region(then if self.get(condition) else orelse)
                assert isinstance(last, ops.Yield)
                self.assign(results, last.values)
            case ops.For(results=results, iterable=iterable, initial=initial, body=body):
                carried = [self.get(each) for each in initial]
                for item in self.get(iterable):
                    for parameter, held in zip(body.parameters, [item, *carried], strict=True):
                        self.values[parameter.name] = held
                    last = self.region(body)
                    assert isinstance(last, ops.Continue)
                    carried = [self.get(each) for each in last.values]
                for result, held in zip(results, carried, strict=True):
                    self.values[result.name] = held
            case ops.Return(value=value):
                self.returned = self.get(value)
            case ops.Yield() | ops.Continue():
                return op
            case _:
                raise AssertionError(op)
        return None

    def assign(self, results: tuple[Value, ...], values: tuple[Operand, ...]) -> None:
        for result, value in zip(results, values, strict=True):
            self.values[result.name] = self.get(value)


def _contents(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.flatten().tolist()
    return [id(part) for part in value] if isinstance(value, list) else None


def _storages(value: Any) -> int:
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else id(value)


def _described(value: Any, places: dict[int, int]) -> Any:
    """The contents of a nested value, with a number for each storage and each list, in the order of appearance."""
    place = places.setdefault(_storages(value), len(places)) if isinstance(value, (torch.Tensor, list)) else -1
    if isinstance(value, torch.Tensor):
        return place, value.shape, repr(value.tolist())
    return place, [_described(part, places) for part in value]


def program_of(seed: int) -> Program:
    program = Generator(seed).program()
    verify(program)
    return program


@examples(120)
@given(st.integers(0, 10**9), st.booleans())
def test_passes_change_nothing_that_can_be_seen(seed: int, flag: bool) -> None:
    program = program_of(seed)
    expected = Interpreter(flag).run(program).outcome()
    for apply in (eliminate_common_subexpressions, eliminate_dead_saves):
        program = apply(program)
        verify(program)
        assert Interpreter(flag).run(program).outcome() == expected, f"{apply.__name__} changed\n{program}"


@examples(60)
@given(st.integers(0, 10**9), st.booleans())
def test_memory_claims_every_write_and_every_alias(seed: int, flag: bool) -> None:
    program = program_of(seed)
    memory = Memory(program)
    values = Interpreter(flag, memory).run(program).values
    for first in values:
        for second in values:
            kinds = isinstance(values[first], (torch.Tensor, list)) and isinstance(values[second], (torch.Tensor, list))
            if kinds and _storages(values[first]) == _storages(values[second]):
                assert memory.may_alias(Value(first), Value(second)), f"{first} is {second}"


def test_the_random_programs_give_the_passes_work() -> None:
    programs = [program_of(seed) for seed in range(200)]
    assert sum(eliminate_common_subexpressions(program) is not program for program in programs) > 40
    assert sum(eliminate_dead_saves(program) is not program for program in programs) > 100
