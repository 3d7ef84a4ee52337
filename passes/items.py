"""Modules, items and iteration, while a program is specialised: what a container holds, what a loop goes over."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import Literal, Module, Slice, Value
from nnsight_compiler.passes import caching
from nnsight_compiler.passes.bounded import TEXT, has_length, length_of
from nnsight_compiler.passes.call_counts import count_calls
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
    StepRange,
    Tracer,
    constant,
    holds_values,
    immutable,
    is_constant,
    is_handle,
    size_of,
)
from nnsight_compiler.passes.step_ranges import StepRanges

if TYPE_CHECKING:
    from nnsight_compiler.passes.interpretation import Interpretation


class Items(StepRanges):
    """Finds the items of what is known: modules of the model, containers of the program, values of arguments."""

    def __init__(self, specialiser: Interpretation) -> None:
        self.specialiser = specialiser

    def _kept(self, op: Op, fact: Any = None, live: int | None = None) -> Abstract:
        kept = self.specialiser.keep(op, fact, live)
        assert kept is not None
        return kept

    # --- modules ---

    def resolved(self, value: Abstract) -> Abstract:
        """The same value; where it is a wrapped model or a module of one, relied on as such."""
        if isinstance(value.fact, Known) and is_handle(value.fact.value) and isinstance(value.operand, Value):
            handle, text = value.fact.value, value.fact.text
            assert text is not None
            self.specialiser.guards.add(text if not handle._path else f"{text}._root", "model", handle._root._token)
            if handle._path:
                self.specialiser.guards.add(f"{text}._path", "value", handle._path)
            value.fact = SiteModule(handle, value.operand, text)
        elif isinstance(value.fact, Recording):
            caching.refuse_use(self.specialiser, value)
        return value

    def module(self, model: Abstract, path: str) -> Abstract:
        """A module that the source program names by its path."""
        root = self.resolved(model)
        assert isinstance(root.fact, SiteModule), "the model of a module is a wrapped model"
        return root if not path else self.module_value(root.fact.handle[path], root.fact, model.span)

    def model(self, value: Abstract, span: Span, method: str) -> SiteModule:
        """The wrapped model whose forward a `with` runs."""
        match self.resolved(value).fact:
            case SiteModule(handle=handle) as module if not handle._path:
                return module
            case OpenSession():
                self.specialiser.fail(
                    span, f"a session has no `.{method}`", f"write `with model.{method}(…):`, on the model itself"
                )
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

    def module_value(self, handle: Any, parent: SiteModule, span: Span) -> Abstract:
        fact = replace(parent, handle=handle)
        return Abstract(Module(parent.model, handle._path), fact, span=span)

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
            if len(text) <= TEXT:
                return Abstract(operand, Known(value, text), loops)
        return Abstract(operand, None, loops, max(part.live for part in parts))

    def item(self, op: ops.Item) -> Abstract:
        base, index = self.resolved(self.specialiser.abstract(op.object)), self.specialiser.abstract(op.index)
        match base.fact:
            case SiteModule(handle=handle):
                return self._submodule(op, base.fact, handle, index)
            case Method(receiver=Abstract(fact=Tracer() as tracer), name="iter"):
                return self.step_item(op, tracer, index)
            case SiteCalls(module=module, call=None):
                number = self.specialiser.demand(index, op.span, "the number of the call")
                if isinstance(number, slice):
                    return self.specialiser.pack(self._part(self.each_call(module, op.span), number, op.span))
                if not isinstance(number, int):
                    self.specialiser.fail(
                        op.span, "`.calls` takes the number of a call, or a slice", "write `.calls[0]`, `.calls[:]`"
                    )
                return Abstract(None, SiteCalls(module, number), span=op.span)
            case SiteCalls():
                self.specialiser.fail(op.span, "this is one call of a module, which has no items")
            case Elements(items=list() as items):
                found = self._element(op, base.fact, items, index)
                if found is not None:
                    return found
        kept = self._kept(op, live=max(base.live, index.live, 1 if holds_values(base.fact) else 0))
        match base.fact, index.fact:
            case Known(value=tuple() | list() | dict() as held), _ if not self._unchanged(held):
                kept.at_run = True
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
        except (LookupError, TypeError, ValueError) as error:
            self.specialiser.fail(
                op.span,
                str(error.args[0] if error.args else error),
                "`print(model)` shows the tree of its modules",
            )
        several = isinstance(key, slice) or isinstance(found, (list, tuple))
        if several or (isinstance(key, int) and key < 0):
            self.specialiser.guards.add(module.torch_module, "length", len(handle))
        if several:
            return self.specialiser.pack([self.module_value(part, module, op.span) for part in found])
        return self.module_value(found, module, op.span)

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
                    self.specialiser.demand(held, op.span, "this key")
                    return item
            return None
        if isinstance(key, slice):
            return self.specialiser.pack(self._part(items, key, op.span)) if base.kind == "tuple" else None
        if not isinstance(key, int) or not -len(items) <= key < len(items):
            return None
        return items[key]

    def _part(self, items: list[Abstract], key: slice, span: Span) -> list[Abstract]:
        try:
            return items[key]
        except (TypeError, ValueError) as error:
            self.specialiser.fail(span, str(error))

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
            case Elements(kind="dict", items=list()):
                self._put(base.fact, index, value)
            case Elements():
                base.fact.forget()
        self.specialiser.change(base)
        use = self.specialiser.use
        self.specialiser.emit(ops.SetItem(use(base), use(index), use(value), span=self.specialiser.span(op)))

    def _put(self, container: Elements, key: Abstract, value: Abstract) -> None:
        """`container[key] = value`, of a dict. It is followed on where its keys are constants of the program."""
        assert container.items is not None
        container.size += size_of(value)
        put(container.keys, container.items, key, value)
        self.specialiser.work(0, container.size)
        if not all(map(is_constant, container.keys)):
            container.forget()

    def unpack(self, op: ops.Unpack) -> None:
        value = self.specialiser.abstract(op.value)
        match value.fact:
            case Elements(items=list() as items) if op.star < 0 and len(items) == len(op.results):
                self.specialiser.bind(op.results, tuple(items))
            case Known(value=tuple() as parts) if (
                value.operand is None and value.make is None and op.star < 0 and len(parts) == len(op.results)
            ):
                self.specialiser.bind(op.results, tuple(map(constant, parts)))  # an item of a tuple that is unrolled
            case _ if isinstance(value.fact, Iteration) or self.mentions_modules(value):
                items = self.iterate(value, op.span)
                rest = len(items) - len(op.results) + 1
                if rest < 0 or (op.star < 0 and rest != 1):
                    self.specialiser.fail(op.span, f"{len(items)} values for {len(op.results)} names")
                if op.star >= 0:
                    starred = Abstract(None, Elements("list", items[op.star : op.star + rest]), span=op.span)
                    items = [*items[: op.star], starred, *items[op.star + rest :]]
                self.specialiser.bind(op.results, tuple(items))
            case _:
                self.specialiser.keep(op)
                if isinstance(value.fact, Known) and isinstance(value.fact.value, (tuple, list)):
                    held, text = value.fact.value, value.fact.text
                    if not self._unchanged(held):
                        for result in op.results:
                            self.specialiser.scope[result].at_run = True
                    elif op.star < 0 and len(held) == len(op.results):
                        for index, result in enumerate(op.results):
                            self.specialiser.scope[result].fact = Known(held[index], text and f"{text}[{index}]")

    def _unchanged(self, held: Any) -> bool:
        """Whether a known container still holds what it held when the program started."""
        return isinstance(held, (tuple, str, range)) or self.specialiser.relies_on(held)

    def prompt(self, arguments: tuple[ops.Argument, ...], span: Span) -> Abstract:
        """The prompt among the arguments of a forward: its first, or `input_ids`."""
        for argument in arguments:
            value = self.specialiser.abstract(argument.value)
            match argument.star, value.fact:
                case "", _ if argument.keyword in (None, "input_ids"):
                    return value
                case "*", Known(value=tuple() | list() as held) if held:
                    return self._indexed(value, 1, span)[0]
                case "**", Known(value=dict() as held) if "input_ids" in held:
                    found = self.specialiser.builder.fresh("prompt")
                    base = self.specialiser.use(value)
                    self.specialiser.emit(ops.Item(found, base, Literal("input_ids"), span=span))
                    return Abstract(found, span=span)
        self.specialiser.fail(span, "the forward around this is given no prompt", "give it one: `model.trace(prompt)`")

    def each_call(self, module: SiteModule, span: Span) -> list[Abstract]:
        """The calls of a module in the forward that is running here. They are counted from the end, so that a run in
        which it is called more often, or less, is noticed."""
        count = count_calls(self.specialiser, module, span)
        return [Abstract(None, SiteCalls(module, number - count), span=span) for number in range(count)]

    # --- iteration ---

    def mentions_modules(self, value: Abstract) -> bool:
        """Whether iterating gives modules of the model, so that a loop over it must be unrolled."""
        self.resolved(value)
        match value.fact:
            case SiteModule() | SiteCalls() | Tracer() | StepRange():
                return True
            case Elements(items=list() as items):
                return any(map(self.mentions_modules, items))
            case Iteration(bases=bases):
                return any(map(self.mentions_modules, bases))
        return False

    def iterate(self, value: Abstract, span: Span) -> list[Abstract]:
        """The items of an iterable, for a loop that is unrolled."""
        self.resolved(value)
        if self.steps_of(value, span) is not None:
            way_out = "write `for step in tracer.iter[…]:`"
            self.specialiser.fail(
                span, "steps of a generation are looped over, and are no values of their own", way_out
            )
        match value.fact:
            case SiteModule(handle=handle) as module:
                self.specialiser.guards.add(module.torch_module, "length", len(handle))
                return [self.module_value(part, module, span) for part in handle]
            case SiteCalls(module=module, call=None):
                return self.each_call(module, span)
            case SiteCalls():
                self.specialiser.fail(span, "this is one call of a module, which cannot be iterated")
            case Elements(kind="dict", items=list()):
                self.specialiser.work(len(value.fact.keys))
                return list(value.fact.keys)
            case Elements(items=list() as items):
                self.specialiser.work(len(items))
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
            case Iteration(kind="keys" | "values" | "items" as kind, bases=(base,)):
                return self._entries(value, kind, base, span)
            case Known(value=list() | dict() as held) if not self._unchanged(held):
                return self.specialiser.unknown(value, span, "what this loop goes over")
            case Known(value=held, text=text) if isinstance(held, (list, tuple, dict)) and not immutable(held):
                return self._elements_of_known(value, held, text, span)
            case Known(value=held):
                if not hasattr(held, "__iter__"):
                    self.specialiser.fail(span, f"a `{type(held).__name__}` cannot be iterated")
                if not immutable(held):
                    return self.specialiser.unknown(value, span, "what this loop goes over")
                self.specialiser.work(length_of(held) if isinstance(held, range) else len(held))
                items = self.specialiser.demand(value, span, "what this loop goes over")
                return [constant(item) for item in items]
        return self.specialiser.unknown(value, span, "what this loop goes over")

    def _columns(self, bases: tuple[Abstract, ...], span: Span) -> list[list[Abstract]]:
        """The columns of a `zip`; one of unknown length follows the known ones, item by item."""
        known: list[list[Abstract] | None] = []
        for base in bases:
            known.append(self.iterate(base, span) if self.countable(base) else None)
        lengths = [len(column) for column in known if column is not None]
        if not lengths:
            return [self.iterate(base, span) for base in bases]
        columns = []
        for base, column in zip(bases, known, strict=True):
            columns.append(column if column is not None else self._indexed(base, min(lengths), span))
        return columns

    def countable(self, value: Abstract) -> bool:
        match self.resolved(value).fact:
            case Iteration(kind="keys" | "values" | "items", bases=(Abstract(fact=Elements(items=items)),)):
                return items is not None
            case (
                SiteModule()
                | SiteCalls(call=None)
                | Elements(items=list())
                | Iteration(kind="keys" | "values" | "items")
            ):
                return True
            case Iteration(bases=bases):
                return any(map(self.countable, bases))
            case Known(value=held):
                listed = isinstance(held, (list, tuple, dict, str, range)) and has_length(held)
                return listed and self._unchanged(held)
        return False

    def listable(self, value: Abstract) -> bool:
        """Whether the items of an iterable can be told now, without drawing them from what gives each of them once."""
        match value.fact:
            case Iteration(kind="keys" | "values" | "items", bases=(Abstract(fact=Known(value=held)),)):
                return self._unchanged(held)
            case Iteration(bases=bases):
                return all(map(self.listable, bases))
            case Known(value=held):
                return immutable(held) or (isinstance(held, (list, tuple, dict)) and self._unchanged(held))
        return self.countable(value)

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

    def _entries(self, value: Abstract, kind: str, base: Abstract, span: Span) -> list[Abstract]:
        """The items of a view of a dict."""
        if isinstance(base.fact, Elements):
            return self._entries_of_followed(kind, base.fact, base, span)
        assert isinstance(base.fact, Known)
        held, text = base.fact.value, base.fact.text
        if not self._unchanged(held):
            return self.specialiser.unknown(base, span, "what this loop goes over")
        listed = self.specialiser.builder.fresh(kind)
        element = ops.Element(self.specialiser.use(value), starred=True)
        self.specialiser.emit(ops.Build(listed, "list", (element,), span=self.specialiser.frame.override or span))
        entries, spelled = list(getattr(held, kind)()), None if text is None else f"list({text}.{kind}())"
        return self._elements_of_known(Abstract(listed, None, value.loops, value.live, span), entries, spelled, span)

    def _entries_of_followed(self, kind: str, container: Elements, base: Abstract, span: Span) -> list[Abstract]:
        if container.items is None:
            return self.specialiser.unknown(base, span, "what this loop goes over")
        self.specialiser.work(len(container.items))
        if kind != "items":
            return list(container.keys if kind == "keys" else container.items)
        pairs = zip(container.keys, container.items, strict=True)
        return [self.specialiser.pack([key, item]) for key, item in pairs]

    def _elements_of_known(self, value: Abstract, held: Any, text: str | None, span: Span) -> list[Abstract]:
        self.specialiser.work(len(held))
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


def put(keys: list[Abstract], items: list[Abstract], key: Abstract, value: Abstract) -> None:
    """What an entry of a dict makes of its keys and their items: the last of two with the same constant key stays."""
    if is_constant(key):
        for place, held in enumerate(keys):
            if is_constant(held) and held.fact == key.fact:
                items[place] = value
                return
    keys.append(key)
    items.append(value)
