"""Attributes and containers, evaluated where they are known, while a program is specialised: what a `.` means.

An attribute of a module is another module, a site, or a value that the module has. What is computed is pure by
construction: attributes of Python modules, of configs and of plain objects that hold them as their own. Everything else
stays an op.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import used
from nnsight_compiler.ir.values import Module, Value
from nnsight_compiler.passes.apply import Calls
from nnsight_compiler.passes.differentiation import gradient_of, outside_of_backward, set_gradient_of
from nnsight_compiler.passes.facts import (
    NO_LOOPS,
    Abstract,
    Elements,
    Iteration,
    Known,
    Method,
    OpenSession,
    Recording,
    SiteCalls,
    SiteModule,
    Tracer,
    anchored,
    constant,
    immutable,
    is_handle,
    python_module,
)
from nnsight_compiler.passes.items import Items, put
from nnsight_compiler.passes.observed_calls import read_inside
from nnsight_compiler.passes.sites import ATTENTION_VALUES
from nnsight_compiler.passes.step_ranges import steps_op
from nnsight_compiler.passes.streams import STREAM, read_stream, write_stream

if TYPE_CHECKING:
    from nnsight_compiler.passes.interpretation import Interpretation

PORTS = ("output", "input", "inputs")
TRACER = ("invoke", "iter", "all", "next", "result", "output", "stop", "cache", "position", "barrier")
"""What a tracer has."""
LIBRARIES = frozenset({"torch", "numpy", "einops", "transformers", *sys.stdlib_module_names}) - {"__main__"}
"""Packages whose modules' attributes no experiment assigns."""
PLAIN_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout"}
"""Attributes of a tensor that are plain Python values."""


class Evaluator(Items):
    """Evaluates the expressions of one interpretation."""

    def __init__(self, specialiser: Interpretation) -> None:
        super().__init__(specialiser)
        self.calls = Calls(specialiser, self)

    def attribute(self, op: ops.Attribute | ops.Read, base: Abstract, name: str) -> Abstract:
        if isinstance(base.fact, Recording) and name == "save":
            return Abstract(None, Method(base, name), span=op.span)
        self.resolved(base)
        match base.fact:
            case SiteModule():
                return self._of_module(op, base, base.fact, name)
            case SiteCalls(call=None):
                self.specialiser.fail(
                    op.span, "`.calls` needs the number of the call", f"write `.calls[0].{name}` for the first"
                )
            case SiteCalls() if name in STREAM:
                return read_stream(self, op, base, name)
            case SiteCalls() if name in PORTS:
                return self._read(op, base, name)
            case SiteCalls() if name == "skip":
                return Abstract(None, Method(base, name), span=op.span)
            case SiteCalls():
                value = self._attention(base, name, op.span)
                if value is not None:
                    return self._read(op, value, "output")
                self.specialiser.fail(
                    op.span,
                    f"a call of a module has no `.{name}`",
                    "a call has `.output`, `.input`, `.inputs` and `.skip(…)`",
                )
            case Tracer(forward=forward):
                return self._of_tracer(op, base, forward, name)
            case OpenSession():
                self.specialiser.fail(
                    op.span,
                    f"a session has no `.{name}`",
                    "write `with model.trace(…):` inside it, and plain Python loops and conditions around traces",
                )
            case Known():
                kept = self._keep_attribute(op, base, name)
                found = self._known_attribute(base.fact, name)
                if found is not None and immutable(found.value) and not self._stays(base.fact.value):
                    kept.at_run = True
                    return kept
                kept.fact = found or Method(base, name)
                return kept
            case Iteration():
                return Abstract(None, Method(base, name), base.loops, span=op.span)
        if base.operand is None and not isinstance(base.fact, Elements):
            return Abstract(None, Method(base, name), base.loops, base.live, op.span)
        self._perhaps_a_module(base, name, op.span)
        if name == "grad" and base.live:
            if self.specialiser.in_backward:  # in a function that is called there
                return gradient_of(self.specialiser, base, op)
            outside_of_backward(self.specialiser, op.span)
        kept = self._keep_attribute(op, base, name)
        if name in PLAIN_ATTRIBUTES:
            kept.live = 0
        kept.fact = Method(base, name)
        return kept

    def _stays(self, held: Any) -> bool:
        """Whether the attributes of a known object still are what they were when the program started."""
        if isinstance(held, torch.Tensor) or (python_module(held) and held.__name__.partition(".")[0] in LIBRARIES):
            return True
        return self.specialiser.relies_on(held)

    def _perhaps_a_module(self, base: Abstract, name: str, span: Span) -> None:
        """Has a stage know what was made before this forward and is now asked for a site: it may be a module."""
        running = self.specialiser.forward
        if name not in PORTS or running is None or base.live or self.specialiser.one_stage:
            return
        if not self.specialiser.made_inside(base):
            self.specialiser.unknown(base, span, "which module this is")

    def _keep_attribute(self, op: ops.Attribute | ops.Read, base: Abstract, name: str) -> Abstract:
        """An attribute that is not a site, whichever way the source was lowered."""
        result = self.specialiser.builder.fresh(op.result.name)
        span = self.specialiser.span(op)
        if isinstance(base.fact, Elements) and base.operand is None:
            self.specialiser.use(base)
        self.specialiser.emit(ops.Attribute(result, self.specialiser.use(base), name, span=span))
        return Abstract(result, None, base.loops, base.live, span, base.at_run)

    @staticmethod
    def _known_attribute(base: Known, name: str) -> Known | None:
        """An attribute of a known object, where reading it runs no code of the user's."""
        value = base.value
        text = None if base.text is None else f"{base.text}.{name}"
        if isinstance(value, torch.Tensor):
            return Known(getattr(value, name), text) if name in PLAIN_ATTRIBUTES else None
        if python_module(value) or isinstance(value, type) or _is_config(value):
            held = getattr(value, name, inspect.Parameter.empty)
            return None if held is inspect.Parameter.empty else anchored(held, text or name, base)
        own = getattr(value, "__dict__", {}) if _reads_plainly(type(value)) else {}
        of_class = inspect.getattr_static(type(value), name, None)
        if name in own and not hasattr(of_class, "__set__"):
            return Known(own[name], text)
        if immutable(of_class) and of_class is not None and _reads_plainly(type(value)):
            return Known(of_class, text)
        return None

    def _of_module(self, op: ops.Attribute | ops.Read, base: Abstract, module: SiteModule, name: str) -> Abstract:
        handle = module.handle
        if name in PORTS:
            return self._read(op, base, name)
        if name in STREAM:
            return read_stream(self, op, base, name)
        if name == "calls":
            return Abstract(None, SiteCalls(module), span=op.span)
        if name == "skip" or (name == "next" and not hasattr(handle._module, "next")):
            return Abstract(None, Method(base, name), span=op.span)
        value = self._attention(base, name, op.span)
        if value is not None:
            return self._read(op, value, "output")
        raw = getattr(handle._module, name, None)
        span = self.specialiser.span(op)
        if isinstance(raw, torch.Tensor):
            result = self.specialiser.builder.fresh(op.result.name)
            operand = Module(module.model, handle._path)
            self.specialiser.emit(ops.Attribute(result, operand, name, span=span))
            return Abstract(result, Method(base, name), span=span)
        try:
            found = getattr(handle, name)
        except AttributeError as error:
            self.specialiser.fail(span, str(error), handle._shown)
        if is_handle(found):
            return self.module_value(found, module, op.span)
        if isinstance(found, list) and all(map(is_handle, found)):
            return self.specialiser.pack([self.module_value(part, module, op.span) for part in found])
        if not handle._path and not hasattr(handle._module, name) and not inspect.ismethod(found):
            kept = self._keep_attribute(op, Abstract(module.model, span=op.span), name)  # the wrapper's, as `tokenizer`
            kept.fact = Known(found, f"{module.text}.{name}")
            return kept
        if callable(found):
            return Abstract(None, Method(base, name), span=op.span)
        kept = self._keep_attribute(op, Abstract(Module(module.model, handle._path), span=op.span), name)
        kept.fact = Known(found, f"{module.torch_module if handle._path else module.text}.{name}")
        return kept

    def _attention(self, base: Abstract, name: str, span: Span) -> Abstract | None:
        """What attention computes, where that is what a name on a module, or on one of its calls, means."""
        module = base.fact.module if isinstance(base.fact, SiteCalls) else base.fact
        if name not in ATTENTION_VALUES or not isinstance(module, SiteModule) or hasattr(module.handle._module, name):
            return None
        try:
            found = module.handle._attention(name)
        except AttributeError as error:
            self.specialiser.fail(span, str(error), "`print(model)` shows the tree of its modules")
        value = self.module_value(found, module, span)
        if isinstance(base.fact, SiteCalls):
            assert isinstance(value.fact, SiteModule)
            value.fact = SiteCalls(value.fact, base.fact.call)
        return value

    def _of_tracer(self, op: ops.Attribute | ops.Read, base: Abstract, forward: Value, name: str) -> Abstract:
        if name in ("result", "output") and self.specialiser.forward is not None:
            if self.specialiser.forward.result != forward:
                self.specialiser.fail(op.span, f"`.{name}` belongs to a forward that is not running here")
            running = self.specialiser.forward
            port = "result" if running.op.method == "generate" else "output"
            return self._read(op, self.module_value(running.module.handle._root, running.module, op.span), port)
        if name not in TRACER:
            names = ", ".join(f"`{each}`" for each in TRACER)
            self.specialiser.fail(self.specialiser.span(op), f"a tracer has no `.{name}`", f"it has {names}")
        return Abstract(None, Method(base, name), span=op.span)

    def _read(self, op: ops.Attribute | ops.Read, base: Abstract, port: str) -> Abstract:
        if isinstance(base.fact, SiteModule):
            span, name = self.specialiser.span(op), op.result.name
            inside = read_inside(self.specialiser, base.fact, port, name, span)
            if inside is not None:
                return inside
        module, call, rows = self.specialiser.site(base, op.span)
        result = self.specialiser.builder.fresh(op.result.name)
        span = self.specialiser.span(op)
        self._access(base, ops.Read(result, module, _port(port), call, rows, span=span))
        return Abstract(result, None, NO_LOOPS, 2, span, True)

    def _access(self, base: Abstract, access: ops.Read | ops.Write) -> None:
        """Emits an access to a site, at the step that `.next()` named."""
        module = base.fact.module if isinstance(base.fact, SiteCalls) else base.fact
        assert isinstance(module, SiteModule)
        if module.step is None:
            self.specialiser.emit(access)
        else:
            self.specialiser.emit(steps_op(self.specialiser, module.step, module.step + 1, (access,), access.span))

    def set_attribute(self, op: ops.SetAttribute | ops.Write, base: Abstract, name: str, value: Abstract) -> None:
        self.resolved(base)
        span = self.specialiser.span(op)
        attention = self._attention(base, name, op.span)
        if attention is not None:
            base, name = attention, "output"
        match base.fact:
            case SiteModule(handle=handle) if name in PORTS and any(
                handle._path == path or handle._path.startswith(f"{path}.") for path in self.specialiser.observed
            ):
                self.specialiser.fail(
                    span,
                    f"`{handle._path}` is called in the body, and what happens inside of that call cannot be changed",
                    "call its parts one by one, and change the values between them",
                )
            case SiteModule() | SiteCalls(call=int()) if name in PORTS:
                module, call, rows = self.specialiser.site(base, op.span)
                new = self.specialiser.use(value)
                self._access(base, ops.Write(module, _port(name), new, call, rows, span=span))
                return
            case SiteModule() | SiteCalls(call=int()) if name in STREAM:
                write_stream(self, op, base, name, value)
                return
            case SiteModule(handle=handle):
                self.specialiser.fail(
                    span,
                    f"`{name}` of `{handle._path or 'the model'}` cannot be assigned in an experiment",
                    f"only `.output`, `.input` and `.inputs` are written here; set `{name}` on the torch module,"
                    f" outside",
                )
            case Elements():
                base.fact.forget()
        self._perhaps_a_module(base, name, span)
        if name == "grad" and base.live:
            if self.specialiser.in_backward:
                set_gradient_of(self.specialiser, base, value, span)
                return
            outside_of_backward(self.specialiser, op.span, written=True)
        self.specialiser.change(base)
        self.specialiser.emit(
            ops.SetAttribute(self.specialiser.use(base), name, self.specialiser.use(value), span=span)
        )

    def truth(self, value: Abstract) -> Abstract:
        """The value, as a condition: containers that are followed have a known truth."""
        match value.fact:
            case Elements(kind="tuple", items=list() as items):
                return constant(bool(items))
            case SiteModule() | Tracer():
                return constant(True)
            case Known(value=held) if not immutable(held):
                return Abstract(value.operand, None, value.loops, value.live, value.span)
        return value

    def build(self, op: ops.Build) -> Abstract:
        items: list[Abstract] | None = []
        keys: list[Abstract] = []
        for element in op.elements:
            part = self.specialiser.abstract(element.value)
            if items is None:
                continue
            if element.starred:
                match part.fact:
                    case Elements(kind="tuple" | "list", items=list() as inner) if op.kind != "dict":
                        items.extend(inner)
                    case _:
                        items = None
                continue
            if element.key is None:
                items.append(part)
            else:
                put(keys, items, self.specialiser.abstract(element.key), part)
        if op.kind == "set" or items is None:
            for value in used(op):
                held = self.specialiser.scope[value]
                if isinstance(held.fact, Elements):
                    held.fact.forget()
            return self._kept(op)
        fact = Elements(op.kind, items, keys)
        self.specialiser.work(0, fact.size)
        if self.mentions_modules(Abstract(None, fact)) and any(part.operand is None for part in items):
            return Abstract(None, fact, span=op.span)
        return self._kept(op, fact, live=0 if op.kind != "tuple" else None)


def _port(name: str) -> ops.Port:
    match name:
        case "output" | "input" | "result":
            return name
    return "inputs"


def _reads_plainly(kind: Any) -> bool:
    """Whether attributes of a class's objects are looked up as Python does by itself."""
    return bool(kind.__getattribute__ is object.__getattribute__)


def _is_config(value: object) -> bool:
    return any(kind.__name__ in ("PretrainedConfig", "PreTrainedConfig") for kind in type(value).__mro__)
