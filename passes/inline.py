"""Inlining, while a program is specialised: helpers, closures and generator expressions that touch the model."""

from __future__ import annotations

import sys
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, ExperimentError
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import walk
from nnsight_compiler.ir.values import NONE, Value
from nnsight_compiler.passes.completion import Unreachable
from nnsight_compiler.passes.facts import (
    Abstract,
    Elements,
    Frame,
    Function,
    Known,
    Method,
    constant,
    immutable,
    is_handle,
)
from nnsight_compiler.passes.kept_calls import Arguments, keep_call
from nnsight_compiler.passes.known_calls import known_method

if TYPE_CHECKING:
    from nnsight_compiler.passes.evaluate import Evaluator
    from nnsight_compiler.passes.interpretation import Interpretation

MAX_DEPTH = 64


class Inlining:
    """Interprets the body of a function where it is called, or keeps the call."""

    def __init__(self, specialiser: Interpretation, evaluator: Evaluator) -> None:
        self.specialiser = specialiser
        self.evaluator = evaluator
        self.generated: list[tuple[Value, Elements]] = []

    def _mentions(self, arguments: Arguments) -> bool:
        """Whether a model or a module of one is among the arguments."""
        return any(
            self.evaluator.mentions_modules(abstract) or isinstance(abstract.fact, Function)
            for _, abstract in arguments
        )

    def _inlinable(self, value: FunctionType | MethodType, arguments: Arguments) -> bool:
        function = value.__func__ if isinstance(value, MethodType) else value
        if not isinstance(function, FunctionType):
            return False
        if _runs_a_model(function):
            return True
        top = (function.__module__ or "").partition(".")[0]
        if (top in sys.stdlib_module_names and top != "__main__") or top in (
            "torch",
            "transformers",
            "nnsight_compiler",
        ):
            return False
        if any(folder in function.__code__.co_filename for folder in ("site-packages", "dist-packages")):
            return False
        bound = isinstance(value, MethodType) and is_handle(value.__self__)
        return self.specialiser.forward is not None or bound or self._mentions(arguments)

    def _helper(
        self,
        op: ops.Call,
        function: Abstract,
        value: FunctionType | MethodType,
        arguments: Arguments,
    ) -> Abstract:
        """A helper of the user's, inlined; a host op where that cannot be and the model is not among its arguments."""
        must = self._mentions(arguments)
        plain = value.__func__ if isinstance(value, MethodType) else value
        assert isinstance(plain, FunctionType)
        try:
            program = self.specialiser.subject.lower(plain)
        except ExperimentError:
            if must:
                raise
            return keep_call(self.specialiser, op, function, arguments)
        cells = dict(zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=False))
        same_file = program.span.file == self.specialiser.program.span.file
        override = None if same_file else self.specialiser.span(op)
        frame = Frame(plain.__globals__, cells, plain.__name__, own=False, override=override)
        given = list(arguments)
        if isinstance(value, MethodType):
            given.insert(0, (ops.Argument(NONE), self._receiver(function, value)))
        defaults = [constant_object(default) for default in plain.__defaults__ or ()]
        keyword_defaults = {name: constant_object(held) for name, held in (plain.__kwdefaults__ or {}).items()}
        match function.fact:
            case Known() as known:
                self.specialiser.guards.rely_on_definition(known)
            case Method(receiver=Abstract(fact=Known(text=str(text))), name=name):
                self.specialiser.guards.rely_on_definition(Known(plain, f"{text}.__class__.{name}"))
        try:
            bound = self._bind(program.parameters, defaults, keyword_defaults, given, op.span)
            return self._inline(
                program.body, dict(zip((p.value for p in program.parameters), bound, strict=True)), frame
            )
        except CompileError:
            if must or _accesses(program.body) or self._takes_gradients(program.body):
                raise
            return keep_call(self.specialiser, op, function, arguments)

    def _receiver(self, function: Abstract, value: MethodType) -> Abstract:
        if isinstance(function.fact, Method):
            return function.fact.receiver
        assert isinstance(function.fact, Known)
        text = None if function.fact.text is None else f"{function.fact.text}.__self__"
        return Abstract(None, Known(value.__self__, text))

    def _closure(self, op: ops.Call, function: Abstract, fact: Function, arguments: Arguments) -> Abstract:
        touches = function.operand is None
        unusable = self._mentions(arguments) or any(abstract.operand is None for _, abstract in arguments)
        if fact.closure.generator:
            if not touches and not unusable:
                return keep_call(self.specialiser, op, function, arguments)
            return self._generated(op, fact, arguments)
        if not touches and not unusable and self.specialiser.forward is None:
            return keep_call(self.specialiser, op, function, arguments)
        parameters = fact.closure.parameters
        optional = [parameter for parameter in parameters if parameter.optional]
        values = dict(zip((p.value for p in optional), fact.closure.defaults, strict=True))
        held = {key: fact.scope[value] if isinstance(value, Value) else self.specialiser.abstract(value)
                for key, value in values.items()}  # fmt: skip
        positional = [held[p.value] for p in optional if p.kind != "keyword_only"]
        keyword = {p.value.name: held[p.value] for p in optional if p.kind == "keyword_only"}
        try:
            bound = self._bind(parameters, positional, keyword, arguments, op.span)
            scope = {**fact.scope, **dict(zip((p.value for p in parameters), bound, strict=True))}
            return self._inline(fact.closure.body, scope, fact.frame)
        except CompileError:
            if touches or unusable or self._takes_gradients(fact.closure.body):
                raise
            return keep_call(self.specialiser, op, function, arguments)

    def _takes_gradients(self, body: ops.Region) -> bool:
        """Whether a function says `.grad` and is called in a backward pass: it cannot run by itself then."""
        return self.specialiser.in_backward and any(
            isinstance(op, (ops.Attribute, ops.SetAttribute)) and op.name == "grad" for op in walk(body)
        )

    def _generated(self, op: ops.Call, fact: Function, arguments: Arguments) -> Abstract:
        """A generator expression over the model: evaluated at once, into a list."""
        acts = self.specialiser.builder.fresh(fact.closure.name.strip("<>") or "items")
        span = self.specialiser.span(op)
        self.specialiser.emit(ops.Build(acts, "list", (), span=span))
        elements = Elements("list", [])
        self.generated.append((acts, elements))
        bound = [abstract for _, abstract in arguments]
        scope = {**fact.scope, **dict(zip((p.value for p in fact.closure.parameters), bound, strict=True))}
        try:
            self._inline(fact.closure.body, scope, fact.frame)
        finally:
            self.generated.pop()
        live = max((item.live for item in elements.items or ()), default=1)
        return Abstract(acts, elements, span=span, live=live)

    def emit_generated(self, op: ops.Emit) -> None:
        """One value of a generator expression; it goes into the list that stands for it."""
        if not self.generated or self.specialiser.closures:
            self.specialiser.keep(op)
            return
        acts, elements = self.generated[-1]
        value = self.specialiser.abstract(op.value)
        if elements.items is not None:
            elements.items.append(value)
        if self.specialiser.rolled:
            elements.forget()
        if value.operand is None:
            return
        span = self.specialiser.span(op)
        append, nothing = self.specialiser.builder.fresh("append"), self.specialiser.builder.fresh()
        self.specialiser.emit(ops.Attribute(append, acts, "append", span=span))
        known = known_method("append")
        target = None if known is None else known.target
        self.specialiser.emit(ops.Call(nothing, append, (ops.Argument(value.operand),), target, span=span))

    def _inline(self, body: ops.Region, scope: dict[Value, Abstract], frame: Frame) -> Abstract:
        """Interprets the body of a function in place; the value that it returns."""
        specialiser = self.specialiser
        if len(specialiser.inlined) >= MAX_DEPTH:
            specialiser.fail(
                specialiser.program.span,
                f"`{frame.name}` calls itself more than {MAX_DEPTH} times",
                "recursion over the model must end at a depth that is known before the run",
            )
        outer = (specialiser.scope, specialiser.frame, specialiser.rolled, specialiser.function)
        specialiser.scope, specialiser.frame, specialiser.function = scope, frame, body
        specialiser.inlined.append(frame.name)
        try:
            with specialiser.builder.region() as made:
                completion = specialiser.region(body)
            for op in made:
                specialiser.emit(op)
        finally:
            specialiser.scope, specialiser.frame, specialiser.rolled, specialiser.function = outer
            specialiser.inlined.pop()
        if completion.kind == "never":
            raise Unreachable
        return completion.values[0] if completion.kind == "return" else Abstract(NONE, Known(None))

    def _bind(
        self,
        parameters: tuple[ops.Parameter, ...],
        defaults: list[Abstract],
        keyword_defaults: dict[str, Abstract],
        arguments: Arguments,
        span: Span,
    ) -> list[Abstract]:
        """The value of each parameter, as Python binds them."""
        plain: list[Abstract] = []
        named: dict[str, Abstract] = {}
        for argument, abstract in arguments:
            if argument.star == "*":
                plain.extend(self.evaluator.iterate(abstract, span))
            elif argument.star == "**":
                if not isinstance(abstract.fact, Elements) or abstract.fact.items is None:
                    self.specialiser.fail(span, "`**` of a mapping that only a run can give cannot be inlined")
                for key, item in zip(abstract.fact.keys, abstract.fact.items, strict=True):
                    named[self.specialiser.demand(key, span, "this keyword")] = item
            elif argument.keyword is not None:
                named[argument.keyword] = abstract
            else:
                plain.append(abstract)
        positional = [p for p in parameters if p.kind in ("positional_only", "positional_or_keyword")]
        filled: dict[Value, Abstract] = dict(zip((p.value for p in positional), plain, strict=False))
        rest = plain[len(positional) :]
        missing: list[str] = []
        offset = len(positional) - len(defaults)
        for index, parameter in enumerate(positional):
            name = parameter.value.name
            if parameter.value not in filled:
                if name in named and parameter.kind == "positional_or_keyword":
                    filled[parameter.value] = named.pop(name)
                elif index >= offset:
                    filled[parameter.value] = defaults[index - offset]
                else:
                    missing.append(name)
        for parameter in parameters:
            name = parameter.value.name
            if parameter.kind == "keyword_only":
                if name in named:
                    filled[parameter.value] = named.pop(name)
                elif name in keyword_defaults:
                    filled[parameter.value] = keyword_defaults[name]
                else:
                    missing.append(name)
            elif parameter.kind == "var_positional":
                filled[parameter.value], rest = self.specialiser.pack(rest), []
            elif parameter.kind == "var_keyword":
                keys = [constant(name) for name in named]
                elements = Elements("dict", list(named.values()), keys)
                filled[parameter.value], named = self._mapping(elements, span), {}
        if missing:
            self.specialiser.fail(span, f"missing arguments: {', '.join(missing)}")
        if rest or named:
            self.specialiser.fail(
                span, f"too many arguments: {len(rest)} without a name, {', '.join(named) or 'none'} named"
            )
        return [filled[parameter.value] for parameter in parameters]

    def _mapping(self, elements: Elements, span: Span) -> Abstract:
        items = elements.items or []
        if any(item.operand is None for item in items):
            return Abstract(None, elements, span=span)
        result = self.specialiser.builder.fresh("kwargs")
        parts = tuple(
            ops.Element(self.specialiser.use(item), self.specialiser.use(key))
            for key, item in zip(elements.keys, items, strict=True)
        )
        self.specialiser.emit(ops.Build(result, "dict", parts, span=span))
        return Abstract(result, elements, span=span)


def constant_object(value: Any) -> Abstract:
    """A default of a helper: fixed when the function was made."""
    return constant(value) if immutable(value) else Abstract(None, Known(value))


def _runs_a_model(function: FunctionType, seen: frozenset[FunctionType] = frozenset()) -> bool:
    """Whether a function of a file, or one that it calls, has forwards of a model: Python cannot run it."""
    program = getattr(function, "__program__", None)
    if not isinstance(program, Program) or function in seen:
        return False
    names = {op.name for op in walk(program.body) if isinstance(op, ops.Global)}
    called = (function.__globals__.get(name) for name in names)
    return _accesses(program.body) or any(
        isinstance(each, FunctionType) and _runs_a_model(each, seen | {function}) for each in called
    )


def _accesses(body: ops.Region) -> bool:
    return any(isinstance(op, (ops.Forward, ops.Edit, ops.Read, ops.Write)) for op in walk(body))
