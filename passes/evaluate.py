"""Names, attributes, items and operators, evaluated where they are known: the expression half of `specialise`.

What is computed here is pure by construction: attributes of Python modules, of configs and of plain objects that hold
them as their own; items of tuples, lists and dicts; operators on numbers and strings. Everything else stays an op.
"""

from __future__ import annotations

import builtins
import inspect
import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import used
from nnsight_compiler.ir.values import Literal, Module, Slice, Value
from nnsight_compiler.passes.apply import Calls
from nnsight_compiler.passes.facts import (
    NO_LOOPS,
    Abstract,
    Elements,
    Iteration,
    Known,
    Method,
    SiteCalls,
    SiteModule,
    Tracer,
    constant,
    immutable,
    is_handle,
    python_module,
)

if TYPE_CHECKING:
    from nnsight_compiler.passes.specialise import Specialiser

PORTS = ("output", "input", "inputs")
PLAIN_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout"}
"""Attributes of a tensor that are plain Python values."""

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "&": operator.and_, "|": operator.or_, "^": operator.xor, "<<": operator.lshift,
    ">>": operator.rshift, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "==": operator.eq, "!=": operator.ne, "is": operator.is_, "is not": operator.is_not,
    "in": lambda left, right: left in right, "not in": lambda left, right: left not in right,
}  # fmt: skip
UNARY: dict[str, Callable[[Any], Any]] = {
    "-": operator.neg,
    "+": operator.pos,
    "~": operator.invert,
    "not": operator.not_,
}


class Evaluator:
    """Evaluates the expressions of one interpretation."""

    def __init__(self, specialiser: Specialiser) -> None:
        self.specialiser = specialiser
        self.calls = Calls(specialiser, self)

    # --- names ---

    def read_name(self, op: ops.Global) -> Abstract:
        frame = self.specialiser.frame
        if op.scope == "free":
            return self._free(op)
        own_builtins = vars(builtins)
        if op.name not in frame.globals and op.name not in own_builtins:
            return self._kept(op)
        value = frame.globals[op.name] if op.name in frame.globals else own_builtins[op.name]
        if frame.own or frame.globals is self.specialiser.subject.globals or self._same_builtin(op.name):
            kept = self._kept(op)
            kept.fact = self._fact(value, op.name)
            return kept
        held = self.specialiser.guards.name(frame.globals, "globals")
        fact = self._fact(value, f"{held}[{op.name!r}]")
        module = frame.globals.get("__name__")
        if vars(sys.modules.get(str(module), builtins)) is not frame.globals:
            return Abstract(Literal(value) if immutable(value) else None, fact, span=op.span)
        owner = self.specialiser.builder.fresh("module")
        result = self.specialiser.builder.fresh(op.name)
        span = self.specialiser.span(op)
        self.specialiser.emit(ops.Import(owner, str(module), leaf=True, span=span))
        self.specialiser.emit(ops.Attribute(result, owner, op.name, span=span))
        return Abstract(result, fact, span=span)

    def _same_builtin(self, name: str) -> bool:
        frame = self.specialiser.frame
        return name not in frame.globals and name not in self.specialiser.subject.globals

    def _free(self, op: ops.Global) -> Abstract:
        frame = self.specialiser.frame
        cell = frame.closure.get(op.name)
        try:
            value = None if cell is None else cell.cell_contents
        except ValueError:
            cell = None
        held = None if cell is None else self.specialiser.guards.name(cell, op.name)
        if frame.own:
            kept = self._kept(op)
            if cell is not None:
                kept.fact = self._fact(value, f"{held}.cell_contents")
            return kept
        if cell is None:
            self.specialiser.fail(op.span, f"`{op.name}` has no value yet")
        fact = self._fact(value, f"{held}.cell_contents")
        return Abstract(Literal(value) if immutable(value) else None, fact, span=op.span)

    def _kept(self, op: Op, fact: Any = None, live: int | None = None) -> Abstract:
        kept = self.specialiser.keep(op, fact, live)
        assert kept is not None
        return kept

    @staticmethod
    def _fact(value: Any, text: str, parent: Known | None = None) -> Known:
        if python_module(value) and (parent is None or parent.anchor is None):
            return Known(value, text, (text, value))
        return Known(value, text, None if parent is None else parent.anchor)

    def resolved(self, value: Abstract) -> Abstract:
        """The same value; where it is a wrapped model or a module of one, relied on as such."""
        if isinstance(value.fact, Known) and is_handle(value.fact.value) and isinstance(value.operand, Value):
            handle, text = value.fact.value, value.fact.text
            assert text is not None
            self.specialiser.guards.add(text if not handle._path else f"{text}._root", "model", handle._root._token)
            if handle._path:
                self.specialiser.guards.add(f"{text}._path", "value", handle._path)
            value.fact = SiteModule(handle, value.operand, text)
        return value

    def module(self, model: Abstract, path: str) -> Abstract:
        """A module that the source program names by its path."""
        root = self.resolved(model)
        assert isinstance(root.fact, SiteModule), "the model of a module is a wrapped model"
        return root if not path else self._module_value(root.fact.handle[path], root.fact, model.span)

    def model(self, value: Abstract, span: Span, method: str) -> SiteModule:
        """The wrapped model whose forward a `with` runs."""
        match self.resolved(value).fact:
            case SiteModule(handle=handle) as module if not handle._path:
                return module
            case SiteModule(handle=handle):
                self.specialiser.fail(
                    span, f"only a whole model can be traced, not its module `{handle._path}`", "trace the model itself"
                )
            case Known(value=held):
                self.specialiser.fail(
                    span,
                    f"`.{method}(…)` is called on a `{type(held).__name__}`, which is not a model",
                    "wrap the module: `NNsight(module)` or `LanguageModel(…)`",
                )
        return self.specialiser.unknown(value, span, "which model runs")

    # --- attributes ---

    def attribute(self, op: ops.Attribute | ops.Read, base: Abstract, name: str) -> Abstract:
        self.resolved(base)
        match base.fact:
            case SiteModule():
                return self._of_module(op, base, base.fact, name)
            case SiteCalls(call=None):
                self.specialiser.fail(
                    op.span, "`.calls` needs the number of the call", f"write `.calls[0].{name}` for the first"
                )
            case SiteCalls():
                return self._read(op, base, name)
            case Tracer(forward=forward):
                return self._of_tracer(op, base, forward, name)
            case Known():
                kept = self._keep_attribute(op, base, name)
                kept.fact = self._known_attribute(base.fact, name) or Method(base, name)
                return kept
            case Iteration():
                return Abstract(None, Method(base, name), base.loops, span=op.span)
        if base.operand is None and not isinstance(base.fact, Elements):
            return Abstract(None, Method(base, name), base.loops, base.live, op.span)
        kept = self._keep_attribute(op, base, name)
        if name in PLAIN_ATTRIBUTES:
            kept.live = 0
        kept.fact = Method(base, name)
        return kept

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
            return None if held is inspect.Parameter.empty else Evaluator._fact(held, text or name, base)
        own = getattr(value, "__dict__", {}) if _reads_plainly(type(value)) else {}
        if name in own and not hasattr(inspect.getattr_static(type(value), name, None), "__set__"):
            return Known(own[name], text)
        return None

    def _of_module(self, op: ops.Attribute | ops.Read, base: Abstract, module: SiteModule, name: str) -> Abstract:
        handle = module.handle
        if name in PORTS:
            return self._read(op, base, name)
        if name == "calls":
            return Abstract(None, SiteCalls(module), span=op.span)
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
            self.specialiser.fail(span, str(error), "`print(model)` shows the tree of its modules")
        if is_handle(found):
            return self._module_value(found, module, op.span)
        if isinstance(found, list) and all(map(is_handle, found)):
            return self.specialiser.pack([self._module_value(part, module, op.span) for part in found])
        path = f"{module.text}._root._module.get_submodule({handle._path!r})"
        if callable(found):
            return Abstract(None, Method(base, name), span=op.span)
        kept = self._keep_attribute(op, Abstract(Module(module.model, handle._path), span=op.span), name)
        own_text = f"{module.text}.{name}" if not handle._path else f"{path}.{name}"
        kept.fact = Known(found, own_text)
        return kept

    def _module_value(self, handle: Any, parent: SiteModule, span: Span) -> Abstract:
        fact = SiteModule(handle, parent.model, parent.text)
        return Abstract(Module(parent.model, handle._path), fact, span=span)

    def _of_tracer(self, op: ops.Attribute | ops.Read, base: Abstract, forward: Value, name: str) -> Abstract:
        if name in ("result", "output") and self.specialiser.forward is not None:
            if self.specialiser.forward.result != forward:
                self.specialiser.fail(op.span, f"`.{name}` belongs to a forward that is not running here")
            module = self.specialiser.forward.module
            return self._read(op, self._module_value(module.handle._root, module, op.span), "output")
        return Abstract(None, Method(base, name), span=op.span)

    def _read(self, op: ops.Attribute | ops.Read, base: Abstract, port: str) -> Abstract:
        module, call = self.specialiser.site(base, op.span)
        result = self.specialiser.builder.fresh(op.result.name)
        span = self.specialiser.span(op)
        self.specialiser.emit(ops.Read(result, module, _port(port), call, span=span))
        return Abstract(result, None, NO_LOOPS, 2, span, True)

    def set_attribute(self, op: ops.SetAttribute | ops.Write, base: Abstract, name: str, value: Abstract) -> None:
        self.resolved(base)
        span = self.specialiser.span(op)
        match base.fact:
            case SiteModule() | SiteCalls(call=int()) if name in PORTS:
                module, call = self.specialiser.site(base, op.span)
                self.specialiser.emit(ops.Write(module, _port(name), self.specialiser.use(value), call, span=span))
                return
            case SiteModule(handle=handle):
                self.specialiser.fail(
                    span,
                    f"`{name}` of `{handle._path or 'the model'}` cannot be assigned in an experiment",
                    f"only `.output`, `.input` and `.inputs` are written here; set `{name}` on the torch module, outside",
                )
            case Elements():
                base.fact.forget()
        self.specialiser.emit(
            ops.SetAttribute(self.specialiser.use(base), name, self.specialiser.use(value), span=span)
        )

    # --- items ---

    def make_slice(self, lower: Abstract, upper: Abstract, step: Abstract) -> Abstract:
        parts = (lower, upper, step)
        use = self.specialiser.use
        operand = Slice(use(lower), use(upper), use(step))
        loops = NO_LOOPS.union(*(part.loops for part in parts))
        facts = [part.fact for part in parts]
        if all(isinstance(fact, Known) and immutable(fact.value) for fact in facts):
            known = [fact for fact in facts if isinstance(fact, Known)]
            value = slice(*(fact.value for fact in known))
            if all(fact.text is None for fact in known):
                return Abstract(operand, Known(value), loops)
            text = f"slice({', '.join(fact.text or repr(fact.value) for fact in known)})"
            return Abstract(operand, Known(value, text), loops)
        return Abstract(operand, None, loops, max(part.live for part in parts))

    def item(self, op: ops.Item) -> Abstract:
        base, index = self.resolved(self.specialiser.abstract(op.object)), self.specialiser.abstract(op.index)
        match base.fact:
            case SiteModule(handle=handle):
                return self._submodule(op, base.fact, handle, index)
            case SiteCalls(module=module, call=None):
                number = self.specialiser.demand(index, op.span, "the number of the call")
                if not isinstance(number, int):
                    self.specialiser.fail(op.span, "`.calls` takes the number of one call", "write `.calls[0]`")
                return Abstract(None, SiteCalls(module, number), span=op.span)
            case Elements(items=list() as items):
                found = self._element(op, base.fact, items, index)
                if found is not None:
                    return found
        kept = self._kept(op, live=max(base.live, index.live))
        match base.fact, index.fact:
            case Known(value=held, text=text), Known(value=key, text=key_text) if isinstance(held, (tuple, list, dict)):
                try:
                    kept.fact = Known(held[key], f"{text}[{key_text or repr(key)}]" if text else None)
                except (LookupError, TypeError):
                    kept.fact = None
            case Elements() as container, _:
                kept.loops |= container.loops
                kept.at_run |= container.at_run
        return kept

    def _submodule(self, op: ops.Item, module: SiteModule, handle: Any, index: Abstract) -> Abstract:
        key = self.specialiser.demand(index, op.span, "which module this is")
        try:
            found = handle[key]
        except (LookupError, TypeError) as error:
            self.specialiser.fail(
                op.span,
                str(error.args[0] if error.args else error),
                "`print(model)` shows the tree of its modules",
            )
        several = isinstance(key, slice) or isinstance(found, (list, tuple))
        if several or (isinstance(key, int) and key < 0):
            self.specialiser.guards.add(
                f"{module.text}._root._module.get_submodule({handle._path!r})", "length", len(handle)
            )
        if several:
            return self.specialiser.pack([self._module_value(part, module, op.span) for part in found])
        return self._module_value(found, module, op.span)

    def _element(self, op: ops.Item, base: Elements, items: list[Abstract], index: Abstract) -> Abstract | None:
        """An element of a container that is followed; `None` where the index is not known."""
        if not isinstance(index.fact, Known) or not immutable(index.fact.value):
            if base.kind == "tuple" and self.mentions_modules(Abstract(None, base)):
                self.specialiser.demand(index, op.span, "which of these modules is meant")
            return None
        if index.fact.text is not None and not self.mentions_modules(Abstract(None, base)):
            return None
        key = self.specialiser.demand(index, op.span, "this index")
        if base.kind == "dict":
            for held, item in zip(base.keys, items, strict=True):
                if isinstance(held.fact, Known) and held.fact.value == key:
                    return item
            return None
        if isinstance(key, slice):
            part = items[key]
            return self.specialiser.pack(part) if base.kind == "tuple" else None
        if not isinstance(key, int) or not -len(items) <= key < len(items):
            return None
        return items[key]

    def set_item(self, op: ops.SetItem) -> None:
        base, index, value = map(self.specialiser.abstract, (op.object, op.index, op.value))
        self.resolved(base)
        match base.fact:
            case SiteModule():
                self.specialiser.fail(op.span, "a module cannot be replaced in an experiment", "set it outside")
            case Elements(kind="list", items=list() as items) if (
                isinstance(index.fact, Known) and index.fact.text is None and isinstance(index.fact.value, int)
            ):
                if -len(items) <= index.fact.value < len(items):
                    items[index.fact.value] = value
                else:
                    base.fact.forget()
            case Elements(kind="dict", items=list() as items):
                base.fact.keys.append(index)
                items.insert(len(items), value)
                base.fact.forget()
            case Elements():
                base.fact.forget()
        use = self.specialiser.use
        self.specialiser.emit(ops.SetItem(use(base), use(index), use(value), span=self.specialiser.span(op)))

    # --- operators and displays ---

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

    def apply(self, op: ops.Operator) -> Abstract:
        parts = [self.resolved(self.specialiser.abstract(operand)) for operand in op.operands]
        for part in parts:
            if isinstance(part.fact, Elements) and op.in_place:
                part.fact.forget()
        if op.operator == "not":
            parts = [self.truth(part) for part in parts]
        value = self._folded(op, parts)
        if value is not None and value.fact is not None and isinstance(value.operand, Literal):
            return value
        if op.operator in ("is", "is not") and any(part.operand is None for part in parts):
            same = parts[0].fact == parts[1].fact
            return constant(same if op.operator == "is" else not same)
        plain = op.operator in ("is", "is not", "not", "in", "not in")
        use = self.specialiser.use
        result = self.specialiser.builder.fresh(op.result.name)
        span = self.specialiser.span(op)
        self.specialiser.emit(
            ops.Operator(result, op.operator, tuple(use(part) for part in parts), op.in_place, span=span)
        )
        loops = NO_LOOPS.union(*(part.loops for part in parts))
        live = 0 if plain else max(part.live for part in parts)
        at_run = any(part.at_run for part in parts)
        return Abstract(result, None if value is None else value.fact, loops, live, span, at_run)

    def _folded(self, op: ops.Operator, parts: list[Abstract]) -> Abstract | None:
        """The result of an operator on known numbers and strings; `None` where it is not known, or raises."""
        facts = [part.fact for part in parts if isinstance(part.fact, Known) and immutable(part.fact.value)]
        if len(facts) != len(parts):
            return None
        table = UNARY if len(parts) == 1 else BINARY
        if op.operator not in table:
            return None
        try:
            value = table[op.operator](*(fact.value for fact in facts))
        except Exception:  # the op stays, and raises for the user at its own line when it runs
            return None
        if all(fact.text is None for fact in facts):
            return constant(value)
        texts = [f"({fact.text})" if fact.text is not None else repr(fact.value) for fact in facts]
        text = f"{op.operator} {texts[0]}" if len(texts) == 1 else f"{texts[0]} {op.operator} {texts[1]}"
        return Abstract(None, Known(value, text)) if immutable(value) else None

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
            items.append(part)
            if element.key is not None:
                keys.append(self.specialiser.abstract(element.key))
        if op.kind == "set" or items is None:
            for value in used(op):
                held = self.specialiser.scope[value]
                if isinstance(held.fact, Elements):
                    held.fact.forget()
            return self._kept(op)
        fact = Elements(op.kind, items, keys)
        if self.mentions_modules(Abstract(None, fact)) and any(part.operand is None for part in items):
            return Abstract(None, fact, span=op.span)
        return self._kept(op, fact, live=0 if op.kind != "tuple" else None)

    def unpack(self, op: ops.Unpack) -> None:
        value = self.specialiser.abstract(op.value)
        match value.fact:
            case Elements(items=list() as items) if op.star < 0 and len(items) == len(op.results):
                self.specialiser.bind(op.results, tuple(items))
            case Iteration() | SiteModule() | SiteCalls():
                items = self.iterate(value, op.span)
                if op.star >= 0 or len(items) != len(op.results):
                    self.specialiser.fail(op.span, f"{len(items)} values for {len(op.results)} names")
                self.specialiser.bind(op.results, tuple(items))
            case _:
                self.specialiser.keep(op)
                if isinstance(value.fact, Known) and isinstance(value.fact.value, (tuple, list)):
                    held, text = value.fact.value, value.fact.text
                    if op.star < 0 and len(held) == len(op.results):
                        for index, result in enumerate(op.results):
                            self.specialiser.scope[result].fact = Known(held[index], text and f"{text}[{index}]")

    # --- iteration ---

    def mentions_modules(self, value: Abstract) -> bool:
        """Whether iterating gives modules of the model, so that a loop over it must be unrolled."""
        self.resolved(value)
        match value.fact:
            case SiteModule() | SiteCalls() | Tracer():
                return True
            case Elements(items=list() as items):
                return any(map(self.mentions_modules, items))
            case Iteration(bases=bases):
                return any(map(self.mentions_modules, bases))
        return False

    def iterate(self, value: Abstract, span: Span) -> list[Abstract]:
        """The items of an iterable, for a loop that is unrolled."""
        self.resolved(value)
        match value.fact:
            case SiteModule(handle=handle) as module:
                self.specialiser.guards.add(
                    f"{module.text}._root._module.get_submodule({handle._path!r})", "length", len(handle)
                )
                return [self._module_value(part, module, span) for part in handle]
            case Elements(kind="dict", items=list()):
                return list(value.fact.keys)
            case Elements(items=list() as items):
                return list(items)
            case Iteration(kind="enumerate", bases=(base,), start=start):
                items = self.iterate(base, span)
                return [self.specialiser.pack([constant(start + n), item]) for n, item in enumerate(items)]
            case Iteration(kind="zip", bases=bases):
                columns = self._columns(bases, span)
                return [self.specialiser.pack(list(row)) for row in zip(*columns, strict=False)]
            case Iteration(kind="reversed", bases=(base,)):
                return self.iterate(base, span)[::-1]
            case Iteration(kind="same", bases=(base,)):
                return self.iterate(base, span)
            case Known(value=held, text=text) if isinstance(held, (list, tuple, dict)) and not immutable(held):
                return self._elements_of_known(value, held, text, span)
            case Known(value=held):
                if not hasattr(held, "__iter__"):
                    self.specialiser.fail(span, f"a `{type(held).__name__}` cannot be iterated")
                if not immutable(held):
                    return self.specialiser.unknown(value, span, "what this loop goes over")
                items = self.specialiser.demand(value, span, "what this loop goes over")
                return [constant(item) for item in items]
        return self.specialiser.unknown(value, span, "what this loop goes over")

    def _columns(self, bases: tuple[Abstract, ...], span: Span) -> list[list[Abstract]]:
        """The columns of a `zip`; one of unknown length follows the known ones, item by item."""
        known: list[list[Abstract] | None] = []
        for base in bases:
            known.append(self.iterate(base, span) if self._countable(base) else None)
        lengths = [len(column) for column in known if column is not None]
        if not lengths:
            return [self.iterate(base, span) for base in bases]
        columns = []
        for base, column in zip(bases, known, strict=True):
            columns.append(column if column is not None else self._indexed(base, min(lengths), span))
        return columns

    def _countable(self, value: Abstract) -> bool:
        match self.resolved(value).fact:
            case SiteModule() | Elements(items=list()):
                return True
            case Iteration(bases=bases):
                return any(map(self._countable, bases))
            case Known(value=held):
                return isinstance(held, (list, tuple, dict, str, range))
        return False

    def _indexed(self, base: Abstract, length: int, span: Span) -> list[Abstract]:
        """The first items of a value that only the run gives."""
        items = []
        for index in range(length):
            result = self.specialiser.builder.fresh("item")
            operand = self.specialiser.use(base)
            self.specialiser.emit(
                ops.Item(result, operand, Literal(index), span=self.specialiser.frame.override or span)
            )
            items.append(Abstract(result, None, base.loops, base.live, span))
        return items

    def _elements_of_known(self, value: Abstract, held: Any, text: str | None, span: Span) -> list[Abstract]:
        if text is not None:
            self.specialiser.guards.add(text, "length", len(held))
        if isinstance(held, dict):
            if text is not None:
                self.specialiser.guards.add(f"tuple({text})", "value", tuple(held))
            return [constant(key) for key in held]
        items = self._indexed(value, len(held), span)
        for index, item in enumerate(items):
            item.fact = Known(held[index], text and f"{text}[{index}]")
        return items


def _port(name: str) -> ops.Port:
    if name == "output":
        return "output"
    return "input" if name == "input" else "inputs"


def _reads_plainly(kind: Any) -> bool:
    """Whether attributes of a class's objects are looked up as Python does by itself."""
    return bool(kind.__getattribute__ is object.__getattribute__)


def _is_config(value: object) -> bool:
    return any(kind.__name__ in ("PretrainedConfig", "PreTrainedConfig") for kind in type(value).__mro__)
