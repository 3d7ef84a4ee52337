"""The operations in the source of a function, and their names.

An operation is a call or an assignment. A call is named by what is called, joined by `_`; an assignment by its target;
the number counts the operations of that name in the order in which they run. So `hidden = f(f(x))` holds `f_0` (the
inner call), `f_1` and `hidden_0`. `x += 1` is `x_iadd_0`.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, final

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider

from nnsight_compiler.ir.errors import ExperimentError
from nnsight_compiler.ir.lines import lines_of

_FRAME = frozenset({"locals", "vars", "dir", "globals", "eval", "exec", "super"})
"""Functions that look at the frame that calls them."""

_AUGMENTED = {
    cst.AddAssign: "iadd", cst.SubtractAssign: "isub", cst.MultiplyAssign: "imul", cst.DivideAssign: "itruediv",
    cst.FloorDivideAssign: "ifloordiv", cst.ModuloAssign: "imod", cst.PowerAssign: "ipow",
    cst.MatrixMultiplyAssign: "imatmul", cst.BitAndAssign: "iand", cst.BitOrAssign: "ior", cst.BitXorAssign: "ixor",
    cst.LeftShiftAssign: "ilshift", cst.RightShiftAssign: "irshift",
}  # fmt: skip


class NoSourceError(ExperimentError):
    """A function whose operations cannot be seen: it is not written in Python, or its source is not at hand."""


@final
@dataclass(frozen=True, slots=True)
class Listing:
    """The operations of one function.

    names: in the order in which they run, were every line to run once.
    lines: the line of each, from 0, in `text`. text: the source. calls: the operations that are calls.
    """

    names: tuple[str, ...]
    lines: dict[str, int]
    text: str
    calls: frozenset[str]

    def __str__(self) -> str:
        """The source with the names of the operations beside its lines."""
        beside: dict[int, list[str]] = {}
        for name in self.names:
            beside.setdefault(self.lines[name], []).append(name)
        wide = max((len(names[-1]) for names in beside.values()), default=0) + 3
        shown = []
        for number, line in enumerate(self.text.rstrip("\n").split("\n")):
            names = beside.get(number, [])
            for name in names[:-1]:
                shown.append(f"{name} ─┐")
            mark = f"{names[-1]} ─▶" if names else ""
            shown.append(f"{mark.ljust(wide)} {line}".rstrip())
        return "\n".join(shown)


@final
@dataclass(frozen=True, slots=True)
class Definition:
    """A function's source, parsed. `names` are those of the operations, by the identity of their nodes."""

    module: cst.Module
    node: cst.FunctionDef
    names: dict[int, str]
    listing: Listing
    first_line: int


_definitions: dict[tuple[CodeType, str], Definition] = {}
_lock = threading.RLock()


def listing(function: Callable[..., Any]) -> Listing:
    """The operations of a function, or of the function within its decorators.

    Raises:
        NoSourceError: there is no Python source.
    """
    return definition_of(unwrapped(function)[0]).listing


def definition_of(function: FunctionType) -> Definition:
    """The source of a function, read once.

    Raises:
        NoSourceError: there is none.
    """
    key = function.__code__, function.__code__.co_filename
    with _lock:
        if key not in _definitions:
            _definitions[key] = _read(function)
        return _definitions[key]


def _read(function: FunctionType) -> Definition:
    code = function.__code__
    first = code.co_firstlineno
    lines = inspect.getblock(lines_of(code.co_filename)[first - 1 :])
    if not lines:
        raise NoSourceError(f"the source of `{function.__qualname__}` is not at hand")
    text = "".join(lines)
    indented = text[:1] in " \t"
    try:
        module = MetadataWrapper(cst.parse_module(f"if True:\n{text}" if indented else text), unsafe_skip_copy=True)
        positions = module.resolve(PositionProvider)
    except cst.ParserSyntaxError:
        raise NoSourceError(f"the source of `{function.__qualname__}` cannot be read by itself") from None
    block = module.module.body[0]
    node: Any = block.body.body[0] if indented else block  # type: ignore[union-attr]
    if not isinstance(node, cst.FunctionDef) or node.name.value != code.co_name:
        raise NoSourceError(f"`{function.__qualname__}` is not a function of its own lines, such as `def` makes")
    names: dict[int, str] = {}
    counts: Counter[str] = Counter()
    places: dict[str, int] = {}
    calls: set[str] = set()
    for stem, part in _operations(node.body):
        name = names[id(part)] = f"{stem}_{counts[stem]}"
        counts[stem] += 1
        places[name] = positions[part].start.line - (2 if indented else 1)
        if isinstance(part, cst.Call) and not _looks_at_frames(part):
            calls.add(name)
    found = Listing(tuple(names.values()), places, text, frozenset(calls))
    return Definition(module.module, node, names, found, first - (1 if indented else 0))


def _looks_at_frames(call: cst.Call) -> bool:
    return isinstance(call.func, cst.Name) and call.func.value in _FRAME


def _operations(node: cst.CSTNode) -> Iterator[tuple[str, cst.CSTNode]]:
    """The operations below a node, in the order in which they run: the name without its number, and the node. Of an
    assignment that is the node of the value."""
    match node:
        case cst.Call():
            yield from _operations(node.func)
            named = [argument for argument in node.args if argument.keyword is None and argument.star != "**"]
            for argument in (*named, *(argument for argument in node.args if argument not in named)):
                yield from _operations(argument.value)
            if not (_looks_at_frames(node) and not node.args):
                yield "_".join(_dotted(node.func)[0]) or "call", node
        case cst.Assign(targets=targets, value=value):
            yield from _operations(value)
            for target in targets:
                yield from _operations(target.target)
            if len(targets) == 1:
                yield from _bound(targets[0].target, value, node)
        case cst.AnnAssign(target=target, value=value):
            if value is not None:
                yield from _operations(value)
                yield from _bound(target, value, node)
        case cst.AugAssign(target=cst.Name(value=name), value=value, operator=kind):
            yield from _operations(value)
            yield f"{name}_{_AUGMENTED[type(kind)]}", node
        case cst.IfExp(test=test, body=body, orelse=orelse):
            for part in (test, body, orelse):
                yield from _operations(part)
        case cst.FunctionDef(body=body):
            yield from _operations(body)
        case cst.Lambda(body=body):
            yield from _operations(body)
        case cst.Annotation():
            return
        case _:
            for child in node.children:
                yield from _operations(child)


def _bound(
    target: cst.BaseExpression, value: cst.BaseExpression, statement: cst.CSTNode
) -> Iterator[tuple[str, cst.CSTNode]]:
    """What an assignment binds; `a, b = e, f` binds each to its own. Any other unpacking is what the call gave."""
    if isinstance(target, (cst.Tuple, cst.List)):
        if isinstance(value, (cst.Tuple, cst.List)) and len(target.elements) == len(value.elements):
            pairs = list(zip(target.elements, value.elements, strict=True))
            if all(type(one) is cst.Element for pair in pairs for one in pair):
                for one, held in pairs:
                    yield from _bound(one.value, held.value, held)
        return
    parts, rooted = _dotted(target)
    if rooted:
        yield "_".join(parts), statement


def _dotted(node: cst.BaseExpression) -> tuple[list[str], bool]:
    """The names of an attribute chain, and whether it begins with a name: `self.heads[i].q` is self, heads, q."""
    parts: list[str] = []
    while True:
        match node:
            case cst.Attribute(value=inner, attr=attribute):
                parts.append(attribute.value)
                node = inner
            case cst.Subscript(value=inner):
                node = inner
            case cst.Name(value=name):
                return [*reversed([*parts, name])], True
            case _:
                return parts[::-1], False


# --- decorators, methods, objects that are called ---


def unwrapped(function: Callable[..., Any]) -> tuple[FunctionType, list[tuple[FunctionType, int]], Any]:
    """The function within the decorators of a callable; these, outermost first, each with the place of its cell that
    holds the next; and whom a method belongs to."""
    receiver: Any = None
    found: Any = function
    if isinstance(found, functools.partial):
        raise NoSourceError("it is a `functools.partial`, which has no source of its own")
    if not isinstance(found, (FunctionType, MethodType)) and isinstance(
        vars(type(found)).get("__call__"), FunctionType
    ):
        found = found.__call__
    if isinstance(found, MethodType):
        receiver, found = found.__self__, found.__func__
    if not isinstance(found, FunctionType):
        name = getattr(found, "__name__", type(found).__name__)
        raise NoSourceError(f"`{name}` is not written in Python, so there are no operations to see in it")
    wrappers: list[tuple[FunctionType, int]] = []
    while (index := _calls_what_it_wraps(found)) is not None:
        wrappers.append((found, index))
        found = (found.__closure__ or ())[index].cell_contents
        if any(found is wrapper for wrapper, _ in wrappers):
            raise NoSourceError(f"`{found.__qualname__}` is wrapped in itself")
    return found, wrappers, receiver


_wrapping: dict[tuple[CodeType, str], tuple[str, ...]] = {}


def _calls_what_it_wraps(function: FunctionType) -> int | None:
    """The cell of a decorator's wrapper that holds the function which it calls by name; `None` where the function is
    no such wrapper."""
    code = function.__code__
    if not code.co_freevars or not function.__closure__:
        return None
    key = code, code.co_filename
    if key not in _wrapping:
        _wrapping[key] = _called_by_name(function)
    cells = zip(code.co_freevars, function.__closure__, strict=True)
    found = [
        index
        for index, (name, cell) in enumerate(cells)
        if name in _wrapping[key] and isinstance(_held(cell), FunctionType)
    ]
    return found[0] if len(found) == 1 else None


def _called_by_name(function: FunctionType) -> tuple[str, ...]:
    try:
        node = definition_of(function).node
    except NoSourceError:
        return ()
    called: list[str] = []

    class Names(cst.CSTVisitor):
        def visit_Call(self, node: cst.Call) -> None:  # noqa: N802  libcst's name
            if isinstance(node.func, cst.Name):
                called.append(node.func.value)

    node.visit(Names())
    return tuple(name for name in function.__code__.co_freevars if name in called)


def _held(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
