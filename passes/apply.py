"""Calls, while a program is specialised: what is known, what is inlined, what stays a host op.

Known calls get their name in the table (`target`). Helpers of the user's are inlined inside a forward, and wherever
they are given a module; a helper whose source cannot be used stays one host op.
"""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any
from typing import Literal as OneOf

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.values import NONE, Module, Value
from nnsight_compiler.passes import caching, differentiation
from nnsight_compiler.passes.facts import (
    Abstract,
    Elements,
    Function,
    Iteration,
    Known,
    Method,
    Recording,
    SiteCalls,
    SiteModule,
    StepRange,
    Tracer,
    holds_values,
    immutable,
    size_of,
)
from nnsight_compiler.passes.inline import Inlining
from nnsight_compiler.passes.kept_calls import Arguments, keep_call
from nnsight_compiler.passes.known_calls import (
    METHODS,
    MODULE_CALL,
    known_function,
    known_method,
    known_target,
    names_class,
)
from nnsight_compiler.passes.observed_calls import is_observed, observe
from nnsight_compiler.passes.subject import Inputs
from nnsight_compiler.passes.transparent_calls import see_through

PLAIN_RESULTS = {
    "item", "tolist", "size", "dim", "numel", "nelement", "stride", "element_size", "is_contiguous", "get_device",
    "data_ptr", "is_floating_point",
}  # fmt: skip
"""Methods of a tensor whose results are plain Python values."""
PLAIN_FUNCTIONS = {len, int, float, str, bool, repr, isinstance, print, id, type, hash, callable}
POSITION = "nnsight_compiler.models.language.LanguageModel.position"
BARRIER = "barrier()"
"""The name of the method that the result of `tracer.barrier(…)` stands for; no attribute has such a name."""
VIEWS: dict[str, OneOf["keys", "values", "items"]] = {"keys": "keys", "values": "values", "items": "items"}


class Calls(Inlining):
    """Interprets the calls of one interpretation."""

    def call(self, op: ops.Call) -> Abstract:
        function = self.evaluator.resolved(self.specialiser.abstract(op.function))
        arguments = [(argument, self.specialiser.abstract(argument.value)) for argument in op.arguments]
        match function.fact:
            case Function() as fact:
                return self._closure(op, function, fact, arguments)
            case SiteModule() as module if is_observed(self.specialiser, arguments, op.span):
                kept = keep_call(self.specialiser, op, function, arguments, target=MODULE_CALL)
                return observe(self.specialiser, module, kept, self.specialiser.span(op))
            case SiteModule():
                return keep_call(self.specialiser, op, function, arguments, target=MODULE_CALL)
            case SiteCalls() | Tracer() | StepRange():
                self.specialiser.fail(op.span, "this cannot be called")
            case Method(receiver=receiver, name=name):
                return self._method(op, function, receiver, name, arguments)
            case Known(value=value):
                return self._known(op, function, value, arguments)
        return keep_call(self.specialiser, op, function, arguments)

    def _known(self, op: ops.Call, function: Abstract, value: Any, arguments: Arguments) -> Abstract:
        assert isinstance(function.fact, Known)
        if value is self.specialiser.subject.save and len(arguments) == 1:
            self.specialiser.guards.rely_on_identity(function.fact)
            return self.save(op, arguments[0][1])
        transparent = see_through(self.specialiser, op, function, value, arguments)
        if transparent is not None:
            return transparent
        if isinstance(value, torch.nn.Module):
            return keep_call(self.specialiser, op, function, arguments, target=MODULE_CALL)
        if value is torch.autograd.grad:
            found = differentiation.gradients(self.specialiser, op, arguments)
            if found is not None:
                self.specialiser.guards.rely_on_identity(function.fact)
                return found
        known = known_function(value)
        if known is not None and known.target.startswith(METHODS):
            # The receiver is the first argument only where the method is spelled with its class.
            known = known if names_class(known.target, function.fact.text or "") else None
        if known is not None:
            self.specialiser.guards.rely_on_identity(function.fact)
            kept = keep_call(self.specialiser, op, function, arguments, known)
            if value in PLAIN_FUNCTIONS:
                kept.live = 0
            return kept
        if isinstance(value, (FunctionType, MethodType)) and self._inlinable(value, arguments):
            return self._helper(op, function, value, arguments)
        return keep_call(self.specialiser, op, function, arguments)

    def _method(
        self,
        op: ops.Call,
        function: Abstract,
        receiver: Abstract,
        name: str,
        arguments: Arguments,
    ) -> Abstract:
        fail = self.specialiser.fail
        match receiver.fact:
            case SiteModule(handle=handle) if name in ("trace", "generate", "scan"):
                fail(
                    op.span,
                    f"`.{name}(…)` without `with` runs nothing",
                    f"write `with {handle._path or 'model'}.{name}(…):`",
                )
            case SiteModule() | SiteCalls() if name == "skip":
                return self.skip(op, receiver, arguments)
            case SiteModule() as module if name == "next" and not hasattr(module.handle._module, "next"):
                return self.evaluator.next_of(op, module)
            case SiteModule():
                return self._of_module(op, receiver, name, arguments)
            case Tracer() if name == "barrier":
                return Abstract(None, Method(receiver, BARRIER), span=op.span)
            case Tracer() if name == BARRIER:
                return Abstract(NONE, Known(None))
            case Tracer() if name == "position":
                return self._position(op, arguments)
            case Tracer() if name == "invoke":
                fail(op.span, "`.invoke(…)` without `with` runs nothing", "write `with tracer.invoke(…):`")
            case Tracer(forward=forward) if name == "stop":
                return self.stop(op, forward, arguments)
            case Tracer(forward=forward) if name == "cache":
                return caching.cache(self.specialiser, op, forward, arguments)
            case Recording() if name == "save":
                return receiver
            case Tracer(forward=forward) if name == "all" and not arguments:
                self.evaluator.refuse_steps_of_trace(op.span)
                return Abstract(None, StepRange(forward), span=op.span)
            case Tracer() if name == "next" and not arguments:
                return self.evaluator.next_step(op)
            case Tracer():
                fail(
                    op.span,
                    f"`tracer.{name}` is not called like this",
                    "`all()` and `next()` take no arguments, and `iter` takes steps in brackets: `iter[:]`",
                )
            case Known(value=value) if isinstance(value, torch.Tensor):
                pass
            case Known(value=dict()) if name in ("keys", "values", "items") and not arguments:
                known = known_method(name)
                assert known is not None
                return keep_call(self.specialiser, op, function, arguments, known, Iteration(VIEWS[name], (receiver,)))
            case Known(value=value) if not isinstance(value, type) and type(value) not in (list, dict, set):
                bound = getattr(type(value), name, None)
                if isinstance(bound, FunctionType) and self._mentions(arguments):
                    return self._helper(op, function, MethodType(bound, value), arguments)
                return keep_call(self.specialiser, op, function, arguments)
            case Elements() as container:
                return self._of_container(op, function, container, name, arguments)
        if name == "backward" and receiver.live and not self.specialiser.closures:
            return differentiation.backward_call(self.specialiser, op, receiver)
        if name == "save" and not arguments and receiver.live:
            return self.save(op, receiver)
        known = known_method(name)
        kept = keep_call(self.specialiser, op, function, arguments, known)
        if name in PLAIN_RESULTS:
            kept.live = 0
        return kept

    def skip(self, op: ops.Call | ops.Skip, module: Abstract, arguments: Arguments) -> Abstract:
        """`module.skip(value)`: the module is not run, and `value` is its output."""
        span = self.specialiser.span(op)
        if len(arguments) != 1 or arguments[0][0].star or arguments[0][0].keyword not in (None, "value"):
            self.specialiser.fail(
                span,
                "`.skip(…)` takes one value: what the module would have returned",
                "write `.skip(value)`, as in `module.skip(module.input)`",
            )
        ((_, value),) = arguments
        operand, call, rows = self.specialiser.site(module, span)
        made = self.specialiser.use(value)
        if rows is None:
            self.specialiser.emit(ops.Skip(operand, made, call, span=span))
        else:  # the module runs, for the rows of others
            self.specialiser.emit(ops.Write(operand, "output", made, call, rows, span=span))
        return Abstract(NONE, Known(None))

    def stop(self, op: ops.Call | ops.Stop, forward: Value, arguments: Arguments) -> Abstract:
        """`tracer.stop()`: the forward ends after what precedes this in the source."""
        span = self.specialiser.span(op)
        if arguments:
            self.specialiser.fail(span, "`.stop()` takes no arguments", "write `tracer.stop()`")
        running = self.specialiser.access(span)
        if running.result != forward:
            self.specialiser.fail(span, "`.stop()` belongs to a forward that is not running here")
        self.specialiser.emit(ops.Stop(forward, span=span))
        return Abstract(NONE, Known(None))

    def _of_module(self, op: ops.Call, receiver: Abstract, name: str, arguments: Arguments) -> Abstract:
        """A method of a module of the model, called as it is: a host op."""
        assert isinstance(receiver.fact, SiteModule)
        method = self.specialiser.builder.fresh(name)
        known = known_target(POSITION) if name == "position" and _finds_positions(receiver.fact.handle) else None
        module = Module(receiver.fact.model, receiver.fact.handle._path) if known is None else receiver.fact.model
        self.specialiser.emit(ops.Attribute(method, module, name, span=self.specialiser.span(op)))
        return keep_call(self.specialiser, op, Abstract(method), arguments, known)

    def _position(self, op: ops.Call, arguments: Arguments) -> Abstract:
        """`tracer.position(words)`: the same as `model.position(prompt, words)`, of the prompt of this forward."""
        fail, running = self.specialiser.fail, self.specialiser.forward
        if running is None:
            fail(op.span, "`.position(…)` of a tracer means the prompt of its forward", "call it inside of that `with`")
        if not _finds_positions(running.module.handle):
            fail(op.span, "positions by words need a tokenizer", "wrap the model by `LanguageModel(…)`")
        prompt = self.evaluator.prompt((running.invoke or running.op).arguments, op.span)
        model = self.evaluator.module_value(running.module.handle._root, running.module, op.span)
        return self._of_module(op, model, "position", [(ops.Argument(NONE), prompt), *arguments])

    def _of_container(
        self,
        op: ops.Call,
        function: Abstract,
        container: Elements,
        name: str,
        arguments: Arguments,
    ) -> Abstract:
        plain = [abstract for argument, abstract in arguments if not argument.star and argument.keyword is None]
        items = container.items
        match name, plain:
            case "save", []:
                assert isinstance(function.fact, Method)
                return self.save(op, function.fact.receiver)
            case "append", [item] if items is not None:
                items.append(item)
                container.size += size_of(item)
                self.specialiser.work(0, container.size)
                if item.operand is None:
                    return Abstract(NONE, Known(None))
            case "append", [item]:
                container.held |= bool(item.live) or holds_values(item.fact)
            case "extend", [Abstract(fact=Elements(items=list() as more))] if items is not None:
                items.extend(more)
                container.size += sum(map(size_of, more))
                self.specialiser.work(0, container.size)
            case "keys" | "values" | "items", [] if container.kind == "dict" and items is not None:
                assert isinstance(function.fact, Method)
                view = Iteration(VIEWS[name], (function.fact.receiver,))
                if function.fact.receiver.operand is None:  # it holds modules
                    return Abstract(None, view, span=op.span)
                return keep_call(self.specialiser, op, function, arguments, known_method(name), view)
            case "index" | "count" | "copy" | "get", _:
                pass
            case _:
                container.forget()
        known = known_method(name)
        kept = keep_call(self.specialiser, op, function, arguments, known)
        kept.loops |= container.loops
        kept.live = 0 if name in ("append", "extend", "insert") else kept.live
        return kept

    def save(self, op: ops.Save | ops.Call, value: Abstract) -> Abstract:
        span = self.specialiser.span(op)
        if self.specialiser.editing:
            self.specialiser.fail(
                span,
                "an edit only changes the model: nobody can be given what it saves",
                "save in the `with edited.trace(…):` that uses the edited model",
            )
        match value.fact:
            case Recording():
                return value
            case SiteModule() | SiteCalls() | Tracer() | StepRange() | Function():
                self.specialiser.fail(span, "only values can be saved, not modules", "save its `.output`")
            case Elements(kind="tuple", items=list() as items):
                return self.specialiser.pack([self.save(op, item) for item in items])
            case Elements() as container:
                container.saved = True
                value.live = 0
                return value
            case Known(value=held) if immutable(held):
                return value
            case Known(value=held) if callable(getattr(type(held), "save", None)):
                self.specialiser.fail(
                    span,
                    f"`.save()` keeps a value here, but a `{type(held).__name__}` has a method of that name",
                    "call it outside of the `with`",
                )
        result = self.specialiser.builder.fresh(op.result.name)
        self.specialiser.emit(ops.Save(result, self.specialiser.use(value), span=span))
        return Abstract(result, None, value.loops, 0, span, value.at_run)

    def known_names(self, value: Abstract) -> list[str]:
        """The keys of a mapping, as far as they are known."""
        try:
            return list(_concrete(value))
        except LookupError:
            return []

    def known_arguments(self, arguments: tuple[ops.Argument, ...]) -> Inputs | None:
        """The inputs of a forward as they are in this call, to observe the model on; `None` where a run gives them."""
        plain: list[Any] = []
        named: dict[str, Any] = {}
        for argument in arguments:
            try:
                value = _concrete(self.specialiser.abstract(argument.value))
            except LookupError:
                return None
            if argument.star == "*":
                plain.extend(value)
            elif argument.star == "**":
                named.update(value)
            elif argument.keyword is not None:
                named[argument.keyword] = value
            else:
                plain.append(value)
        return tuple(plain), named


def _concrete(value: Abstract) -> Any:
    match value.fact:
        case Known(value=held):
            return held
        case Elements(kind="dict", items=list() as items, keys=keys):
            return {_concrete(key): _concrete(item) for key, item in zip(keys, items, strict=True)}
        case Elements(kind=kind, items=list() as items):
            made = [_concrete(item) for item in items]
            return tuple(made) if kind == "tuple" else made
    raise LookupError


def _finds_positions(handle: Any) -> bool:
    return not handle._path and hasattr(type(handle), "position")
