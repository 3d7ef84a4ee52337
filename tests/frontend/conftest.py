"""A plain interpreter of IR, for the tests here: what the host ops mean, written down as directly as possible.

A forward only binds its tracer and runs its body.
"""

from __future__ import annotations

import builtins
import inspect
import operator
from collections.abc import Callable, Generator, Mapping
from typing import Any

import pytest

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op, Parameter, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.values import Literal, Operand, Slice, Tuple, Unbound, Value
from nnsight_compiler.ir.verifier import verify


class _Nothing:
    """What an unassigned variable holds."""


NOTHING = _Nothing()
Frame = dict[str, Any]
Exit = tuple[str, tuple[Any, ...]]
Running = Generator[Any, None, Exit | None]

BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "**": operator.pow, "@": operator.matmul, "<<": operator.lshift, ">>": operator.rshift,
    "&": operator.and_, "|": operator.or_, "^": operator.xor, "==": operator.eq, "!=": operator.ne, "<": operator.lt,
    "<=": operator.le, ">": operator.gt, ">=": operator.ge, "is": operator.is_, "is not": operator.is_not,
    "in": lambda a, b: a in b, "not in": lambda a, b: a not in b,
}  # fmt: skip
UNARY: Mapping[str, Callable[[Any], Any]] = {
    "not": operator.not_, "-": operator.neg, "+": operator.pos, "~": operator.inv,
}  # fmt: skip
IN_PLACE: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": operator.iadd, "-": operator.isub, "*": operator.imul, "/": operator.itruediv, "//": operator.ifloordiv,
    "%": operator.imod, "**": operator.ipow, "@": operator.imatmul, "<<": operator.ilshift, ">>": operator.irshift,
    "&": operator.iand, "|": operator.ior, "^": operator.ixor,
}  # fmt: skip


class Interpreter:
    """Runs a program of which no op needs a model."""

    def __init__(self, program: Program, namespace: Mapping[str, Any], closure: Mapping[str, Any]) -> None:
        self.program = program
        self.namespace = namespace
        self.closure = closure

    def function(self, defaults: tuple[Any, ...] = ()) -> Callable[..., Any]:
        return self._function(self.program.parameters, defaults, self.program.body, {}, False, self.program.name)

    def _function(
        self,
        parameters: tuple[Parameter, ...],
        defaults: tuple[Any, ...],
        body: Region,
        frame: Frame,
        generator: bool,
        name: str,
    ) -> Callable[..., Any]:
        rest = iter(defaults)
        signature = inspect.Signature(
            [
                inspect.Parameter(
                    each.value.name.split(".")[0],
                    getattr(inspect.Parameter, each.kind.upper()),
                    default=next(rest, NOTHING) if each.optional else inspect.Parameter.empty,
                )
                for each in parameters
            ]
        )

        def bind(*args: Any, **kwargs: Any) -> Frame:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            values = zip(parameters, bound.arguments.values(), strict=True)
            return {**frame, **{each.value.name: value for each, value in values}}

        def call(*args: Any, **kwargs: Any) -> Any:
            running = self.region(body, bind(*args, **kwargs))
            try:
                next(running)
            except StopIteration as stop:
                return None if stop.value is None else stop.value[1][0]
            raise AssertionError("emit outside of a generator")

        def generate(*args: Any, **kwargs: Any) -> Generator[Any, None, None]:
            yield from self.region(body, bind(*args, **kwargs))

        made = generate if generator else call
        made.__name__ = name
        return made

    def value(self, operand: Operand, frame: Frame) -> Any:
        match operand:
            case Value(name=name):
                return frame[name]
            case Literal(value=value):
                return value
            case Unbound():
                return NOTHING
            case Slice(lower=lower, upper=upper, step=step):
                return slice(*(self.value(part, frame) for part in (lower, upper, step)))
            case Tuple(parts=parts):
                return tuple(self.value(part, frame) for part in parts)
        raise AssertionError(operand)

    def region(self, region: Region, frame: Frame) -> Running:
        for op in region.ops:
            leaving = yield from self.op(op, frame)
            if leaving is not None:
                return leaving
        return None

    def op(self, op: Op, frame: Frame) -> Running:
        get = lambda operand: self.value(operand, frame)  # noqa: E731
        match op:
            case ops.Yield(values=values):
                return "yield", tuple(map(get, values))
            case ops.Break(values=values):
                return "break", tuple(map(get, values))
            case ops.Continue(values=values):
                return "continue", tuple(map(get, values))
            case ops.Return(value=value):
                return "return", (get(value),)
            case ops.Raise(exception=None):
                raise
            case ops.Raise(exception=exception, cause=None):
                raise get(exception)
            case ops.Raise(exception=exception, cause=cause):
                raise get(exception) from get(cause)
            case ops.Emit(value=value):
                yield get(value)
            case ops.If(results=results, condition=condition, then=then, orelse=orelse):
                leaving = yield from self.region(then if get(condition) else orelse, frame)
                if leaving is not None and leaving[0] != "yield":
                    return leaving
                self.define(results, () if leaving is None else leaving[1], frame)
            case ops.For():
                return (yield from self.for_loop(op, frame))
            case ops.While():
                return (yield from self.while_loop(op, frame))
            case ops.Try():
                return (yield from self.attempt(op, frame))
            case ops.Forward(result=result, model=model, body=body):
                frame[result.name] = get(model).tracer
                return (yield from self.region(body, frame))
            case ops.With(result=result, context=context, body=body):
                with get(context) as entered:
                    frame[result.name] = entered
                    return (yield from self.region(body, frame))
            case ops.Closure(result=result, parameters=parameters, defaults=defaults, body=body, generator=generator):
                values = tuple(map(get, defaults))
                frame[result.name] = self._function(parameters, values, body, frame, generator, op.name)
            case _:
                self.simple(op, frame)
        return None

    def define(self, results: tuple[Value, ...], values: tuple[Any, ...], frame: Frame) -> None:
        for result, value in zip(results, values, strict=True):
            frame[result.name] = value

    def for_loop(self, op: ops.For, frame: Frame) -> Running:
        carried = tuple(self.value(each, frame) for each in op.initial)
        for item in self.value(op.iterable, frame):
            self.define(op.body.parameters, (item, *carried), frame)
            leaving = yield from self.region(op.body, frame)
            assert leaving is not None, "a loop's body ends in a jump"
            if leaving[0] == "return":
                return leaving
            carried = leaving[1]
            if leaving[0] == "break":
                self.define(op.results, carried, frame)
                return None
        return (yield from self.otherwise(op, carried, frame))

    def while_loop(self, op: ops.While, frame: Frame) -> Running:
        carried = tuple(self.value(each, frame) for each in op.initial)
        while True:
            self.define(op.condition.parameters, carried, frame)
            tested = yield from self.region(op.condition, frame)
            assert tested is not None, "a condition yields"
            condition, *rest = tested[1]
            carried = tuple(rest)
            if not condition:
                return (yield from self.otherwise(op, carried, frame))
            self.define(op.body.parameters, carried, frame)
            leaving = yield from self.region(op.body, frame)
            assert leaving is not None, "a loop's body ends in a jump"
            if leaving[0] == "return":
                return leaving
            carried = leaving[1]
            if leaving[0] == "break":
                self.define(op.results, carried, frame)
                return None

    def otherwise(self, op: ops.For | ops.While, carried: tuple[Any, ...], frame: Frame) -> Running:
        if op.orelse is not None:
            self.define(op.orelse.parameters, carried, frame)
            leaving = yield from self.region(op.orelse, frame)
            if leaving is not None and leaving[0] != "yield":
                return leaving
            carried = () if leaving is None else leaving[1]
        self.define(op.results, carried, frame)
        return None

    def attempt(self, op: ops.Try, frame: Frame) -> Running:
        try:
            try:
                leaving = yield from self.region(op.body, frame)
            except BaseException as error:
                for handler in op.handlers:
                    if handler.types is not None:
                        types = yield from self.region(handler.types, frame)
                        assert types is not None, "the types are yielded"
                        if not isinstance(error, types[1][0]):
                            continue
                    self.define(handler.body.parameters, (error,), frame)
                    return (yield from self.region(handler.body, frame))
                raise
            if leaving is None and op.orelse is not None:
                leaving = yield from self.region(op.orelse, frame)
            return leaving
        finally:
            if op.finalizer is not None:
                final = yield from self.region(op.finalizer, frame)
                if final is not None:
                    return final  # noqa: B012

    def simple(self, op: Op, frame: Frame) -> None:
        get = lambda operand: self.value(operand, frame)  # noqa: E731
        result: Any = None
        match op:
            case ops.Global(name=name, scope="free"):
                result = self.closure[name].cell_contents
            case ops.Global(name=name):
                if name not in self.namespace and not hasattr(builtins, name):
                    raise NameError(f"name '{name}' is not defined")
                result = self.namespace[name] if name in self.namespace else getattr(builtins, name)
            case ops.SetGlobal(name=name, value=value, scope="free"):
                self.closure[name].cell_contents = get(value)
            case ops.SetGlobal(name=name, value=value):
                self.namespace[name] = get(value)  # type: ignore[index]
            case ops.Cell(initial=initial):
                result = [get(initial)]
            case ops.Load(cell=cell, name=name):
                result = get(cell)[0]
                if result is NOTHING:
                    raise UnboundLocalError(name)
            case ops.Store(cell=cell, value=value):
                get(cell)[0] = get(value)
            case ops.Bound(value=value, name=name):
                result = get(value)
                if result is NOTHING:
                    raise UnboundLocalError(name)
            case ops.Import(module=module, name=name, level=level, leaf=leaf):
                from_list = () if name is None else (name,)
                result = __import__(module, dict(self.namespace), None, from_list, level)
                for part in module.split(".")[1:] if leaf else [name] if name else []:
                    if not hasattr(result, part):
                        raise ImportError(part)
                    result = getattr(result, part)
            case ops.Attribute(object=owner, name=name):
                result = getattr(get(owner), name)
            case ops.SetAttribute(object=owner, name=name, value=value):
                setattr(get(owner), name, get(value))
            case ops.Item(object=owner, index=index):
                result = get(owner)[get(index)]
            case ops.SetItem(object=owner, index=index, value=value):
                get(owner)[get(index)] = get(value)
            case ops.Delete(object=owner, index=None, name=str(name)):
                delattr(get(owner), name)
            case ops.Delete(object=owner, index=index) if index is not None:
                del get(owner)[get(index)]
            case ops.Build():
                result = self.build(op, frame)
            case ops.Format(parts=parts):
                texts = []
                for part in parts:
                    if isinstance(part, str):
                        texts.append(part)
                        continue
                    value = get(part.value)
                    value = {"": lambda x: x, "r": repr, "s": str, "a": ascii}[part.conversion](value)
                    specification = "" if part.specification is None else get(part.specification)
                    texts.append(format(value, specification))
                result = "".join(texts)
            case ops.Unpack(results=results, value=value, star=star):
                self.define(results, _unpacked(get(value), len(results), star), frame)
            case ops.Operator(operator=sign, operands=operands, in_place=in_place):
                values = [get(operand) for operand in operands]
                table: Mapping[str, Callable[..., Any]] = IN_PLACE if in_place else BINARY
                result = (UNARY if len(values) == 1 else table)[sign](*values)
            case ops.Call(function=function, arguments=arguments):
                args: list[Any] = []
                kwargs: dict[str, Any] = {}
                for argument in arguments:
                    value = get(argument.value)
                    if argument.star == "*":
                        args.extend(value)
                    elif argument.star == "**":
                        if set(kwargs) & set(value):
                            raise TypeError("multiple values for a keyword argument")
                        kwargs.update(value)
                    elif argument.keyword is not None:
                        if argument.keyword in kwargs:
                            raise TypeError("multiple values for a keyword argument")
                        kwargs[argument.keyword] = value
                    else:
                        args.append(value)
                result = get(function)(*args, **kwargs)
            case _:
                raise AssertionError(f"not a host op: {op}")
        if isinstance(getattr(op, "result", None), Value):
            frame[op.result.name] = result  # type: ignore[attr-defined]  # just looked

    def build(self, op: ops.Build, frame: Frame) -> Any:
        if op.kind == "dict":
            made: dict[Any, Any] = {}
            for each in op.elements:
                value = self.value(each.value, frame)
                if each.key is None:
                    made.update({**value})
                else:
                    made[self.value(each.key, frame)] = value
            return made
        parts: list[Any] = []
        for each in op.elements:
            value = self.value(each.value, frame)
            if each.starred:
                parts.extend(value)
            else:
                parts.append(value)
        return {"tuple": tuple, "list": list, "set": set}[op.kind](parts)


def _unpacked(value: Any, count: int, star: int) -> tuple[Any, ...]:
    parts = list(value)
    if star < 0:
        if len(parts) != count:
            raise ValueError("a wrong number of values to unpack")
        return tuple(parts)
    if len(parts) < count - 1:
        raise ValueError("not enough values to unpack")
    after = count - 1 - star
    middle = parts[star : len(parts) - after]
    return (*parts[:star], middle, *parts[len(parts) - after :])


def interpret(
    program: Program,
    namespace: Mapping[str, Any],
    closure: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The program as a function, after the verifier has looked at it."""
    verify(program)
    return Interpreter(program, namespace, closure).function(tuple((defaults or {}).values()))


@pytest.fixture(name="interpret", scope="session")
def interpret_fixture() -> Callable[..., Callable[..., Any]]:
    return interpret


@pytest.fixture(name="nothing", scope="session")
def nothing_fixture() -> object:
    return NOTHING
