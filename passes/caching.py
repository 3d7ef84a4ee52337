"""`tracer.cache(…)`, while a program is specialised: which modules a cache holds, and when it may be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import definitions, used, walk
from nnsight_compiler.ir.values import Literal, Operand, Tuple, Value
from nnsight_compiler.passes.facts import (
    Abstract,
    Elements,
    Function,
    Known,
    Recording,
    SiteModule,
    constant,
    immutable,
)

if TYPE_CHECKING:
    from nnsight_compiler.passes.interpretation import Interpretation

KEYWORDS = ("modules", "device", "dtype", "detach", "include_output", "include_inputs")
"""The arguments of `tracer.cache`, in the order in which they may be given by position."""

Arguments = list[tuple[ops.Argument, Abstract]]


def cache(specialiser: Interpretation, op: ops.Call, forward: Value, arguments: Arguments) -> Abstract:
    """The container of one `tracer.cache(…)`."""
    running = specialiser.access(op.span)
    if running.result != forward:
        specialiser.fail(op.span, "this tracer belongs to a forward that is not running here")
    if specialiser.conditions or specialiser.rolled:
        specialiser.fail(
            op.span,
            "whether, or how often, this cache is made depends on what only a run can give",
            "call `tracer.cache(…)` outside of the condition or the loop",
        )
    given = _bound(specialiser, op, arguments)
    chosen = _Chosen(specialiser, running.module, op.span)
    modules = given.get("modules", constant(None))
    everything = isinstance(modules.fact, Known) and modules.fact.value is None
    if everything:
        specialiser.demand(modules, op.span, "which modules this cache holds")
    else:
        chosen.add(modules)
        if not chosen.named and not chosen.others:
            specialiser.fail(
                op.span, "no module is chosen for this cache", "leave `modules` out to record every module"
            )
    ports = [
        port
        for port, name, default in (("output", "include_output", True), ("inputs", "include_inputs", False))
        if specialiser.demand(given.get(name, constant(default)), op.span, f"`{name}`")
    ]
    if not ports:
        specialiser.fail(
            op.span, "this cache would hold neither outputs nor inputs", "leave `include_output=False` out"
        )

    def option(name: str, default: Any) -> Operand:
        return specialiser.use(given[name]) if name in given else Literal(default)

    result = specialiser.builder.fresh(op.result.name)
    specialiser.emit(
        ops.Cache(
            result,
            running.module.model,
            _texts(chosen.named),
            Literal(None) if everything else _texts(chosen.others),
            _texts(ports),
            option("device", None),
            option("dtype", None),
            option("detach", True),
            running.rows,
            span=specialiser.span(op),
        )
    )
    return Abstract(result, Recording(forward), span=op.span)


def refuse_use(specialiser: Interpretation, value: Abstract) -> None:
    """Called where a cache is used as a value: it is none before the end of its forward."""
    assert isinstance(value.fact, Recording)
    if specialiser.forward is not None and specialiser.forward.result == value.fact.forward:
        specialiser.fail(
            specialiser.program.span if value.span is None else value.span,
            "this cache is used while it is filled: it holds values when the forward has ended",
            "use it after the `with`; inside, read the modules themselves",
        )
    value.fact, value.at_run = None, True


def module_named(root: Any, name: str) -> Any:
    """The module that a dotted name means: by its own names, standard names, or `model` for the model itself.

    Raises:
        AttributeError, LookupError, TypeError: there is none.
    """
    found = root
    for part in name.split(".") if name else ():
        if part in found._module._modules:
            found = found[part]
        elif part == "model" and found is root:
            continue
        else:
            found = found[int(part)] if part.isdecimal() else getattr(found, part)
    return found


@dataclass(slots=True)
class _Chosen:
    """The modules of one cache. named: those that must run. others: those that are left out where they do not."""

    specialiser: Interpretation
    model: SiteModule
    span: Span
    named: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def add(self, value: Abstract) -> None:
        specialiser = self.specialiser
        specialiser.evaluate.resolved(value)
        match value.fact:
            case SiteModule(handle=handle):
                self.module(handle, handle._root is self.model.handle._root)
            case Function():
                self.filter(_python_function(specialiser, value.fact, self.span), "the filter")
            case Known(value=str()):
                self.name(specialiser.demand(value, self.span, "the name of a module"))
            case Known(value=held) if callable(held) and not isinstance(held, nn.Module):
                if isinstance(held, FunctionType):
                    specialiser.guards.rely_on_definition(value.fact)
                else:
                    specialiser.guards.rely_on_identity(value.fact)
                self.filter(held, f"`{getattr(held, '__name__', type(held).__name__)}`")
            case Elements() | Known(value=list() | tuple() | set() | dict()):
                for item in specialiser.evaluate.iterate(value, self.span):
                    self.add(item)
            case Known(value=nn.Module() as held):
                path = next((path for path, each in self.modules() if each is held), None)
                if path is None:
                    specialiser.fail(self.span, f"this `{type(held).__name__}` is no module of the model")
                specialiser.guards.rely_on_identity(value.fact)
                self.named.append(path)
            case Known(value=held):
                specialiser.fail(
                    self.span,
                    f"a `{type(held).__name__}` chooses no module of a cache",
                    "give names, modules, a function `(name, module) -> bool`, or a list of these",
                )
            case _:
                specialiser.unknown(value, self.span, "which modules this cache holds")

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield from self.model.handle._module.named_modules()

    def module(self, handle: Any, own: bool) -> None:
        if not own:
            self.specialiser.fail(
                self.span, f"`{handle._path or 'the model'}` belongs to another model than the one that is traced here"
            )
        if isinstance(handle._module, (nn.ModuleList, nn.ModuleDict)):
            self.named.extend(view._path for view in handle.children())
        else:
            self.named.append(handle._path)

    def name(self, name: str) -> None:
        if "*" in name or "?" in name or "[" in name:
            found = [name for name in self.matching(name)]
            if not found:
                self.unknown(name, f"no module has a name like `{name}`")
            self.others.extend(found)
            return
        try:
            found_module = module_named(self.model.handle, name)
        except (AttributeError, LookupError, TypeError) as error:
            self.unknown(name, f"no module has the name `{name}`", str(error.args[0] if error.args else error))
            return
        if not hasattr(found_module, "_path"):
            self.unknown(name, f"`{name}` is no module")
        self.module(found_module, True)

    def matching(self, pattern: str) -> Iterator[str]:
        """The paths of the modules that a pattern means, part by part, in own names and standard ones."""
        found = [self.model.handle]
        for number, part in enumerate(pattern.split(".")):
            inner = []
            for view in found:
                names = view._module._modules
                if "*" not in part and "?" not in part and "[" not in part and part not in names:
                    try:
                        inner.append(module_named(view, part) if number == 0 or part != "model" else view)
                    except (AttributeError, LookupError, TypeError):
                        continue
                else:
                    inner += [view[name] for name in names if fnmatchcase(name, part) and names[name] is not None]
            found = [view for view in inner if hasattr(view, "_path")]
        yield from (view._path for view in found)

    def unknown(self, name: str, reason: str, hint: str = "") -> None:
        near = get_close_matches(name, [path for path, _ in self.modules()], n=3, cutoff=0.5)
        near_by = f"did you mean {', '.join(near)}?" if near else "`print(model)` shows the tree of its modules"
        self.specialiser.fail(self.span, reason, hint or near_by)

    def filter(self, chooses: Callable[[str, nn.Module], Any], title: str) -> None:
        for path, module in self.modules():
            try:
                if chooses(path, module):
                    self.others.append(path)
            except Exception as error:
                self.specialiser.fail(
                    self.span,
                    f"{title} raised {type(error).__name__} for the module `{path}`: {error}",
                    "a filter takes the name of a module and the module, and says whether it is recorded",
                )


def _bound(specialiser: Interpretation, op: ops.Call, arguments: Arguments) -> dict[str, Abstract]:
    """The arguments by their names."""
    given: dict[str, Abstract] = {}
    for number, (argument, value) in enumerate(arguments):
        name = argument.keyword or (KEYWORDS[number] if number < len(KEYWORDS) else None)
        if argument.star or name is None or name in given:
            takes = f"it takes: {', '.join(KEYWORDS)}"
            specialiser.fail(op.span, "`tracer.cache` takes each of its arguments once", takes)
        if name not in KEYWORDS:
            near = get_close_matches(name, KEYWORDS, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it takes: {', '.join(KEYWORDS)}"
            specialiser.fail(op.span, f"`tracer.cache` takes no `{name}`", hint)
        given[name] = value
    return given


def _texts(texts: list[str]) -> Tuple:
    return Tuple(tuple(map(Literal, dict.fromkeys(texts))))


def _python_function(specialiser: Interpretation, function: Function, span: Span) -> Callable[..., Any]:
    """The function that a closure of the program is, where all that it sees is known now: it is called while the
    program is compiled."""
    closure, make = function.closure, specialiser.subject.function
    assert make is not None, "a program with such a closure is specialised with what makes functions"
    own = {value.name for value in definitions(closure.body)} | {each.value.name for each in closure.parameters}
    taken = {value for op in walk(closure.body) for value in used(op) if value.name not in own}

    def known(value: Abstract) -> Any:
        specialiser.evaluate.resolved(value)
        match value.fact:
            case Known(value=held) if immutable(held):
                return specialiser.demand(value, span, "what a filter of modules sees")
            case Known(value=held):
                specialiser.guards.rely_on_identity(value.fact)
                return held
        return specialiser.unknown(value, span, "what a filter of modules sees")

    held = {value: known(function.scope[value]) for value in taken}
    for op in walk(closure.body):
        if isinstance(op, ops.Global) and op.scope == "global" and function.frame.own:
            value = function.frame.globals.get(op.name)
            if op.name in function.frame.globals and immutable(value):
                specialiser.guards.add(op.name, "value", value)
    optional = [each for each in closure.parameters if each.optional]
    defaults = {
        each.value.name.partition(".")[0]: known(
            function.scope[default] if isinstance(default, Value) else specialiser.abstract(default)
        )
        for each, default in zip(optional, closure.defaults, strict=True)
    }
    parameters = (*(ops.Parameter(value) for value in held), *closure.parameters)
    program = Program("filter", parameters, closure.body, kind="function", span=closure.span)
    made = make(program, function.frame.globals, function.frame.closure, defaults)
    return lambda *given: made(*held.values(), *given)
