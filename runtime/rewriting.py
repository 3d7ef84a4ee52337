"""Functions of a model rewritten so that what they do can be seen and changed, operation by operation.

    hidden = torch.relu(self.fc1(x))
        ──▶
    hidden = _operation_("torch_relu_0", torch.relu, _operation_("self_fc1_0", self.fc1, x))

An operation is a call or an assignment. A call is named by what is called, joined by `_`; an assignment by its target;
the number counts the operations of that name in the order in which they run. So `hidden = f(f(x))` holds `f_0` (the
inner call), `f_1` and `hidden_0`. `x += 1` is `x_iadd_0`. Only the operations that are asked for are rewritten, on
their own lines, so that tracebacks name the lines of the model's file. The function itself stays as it is: a second one
is made, with the same globals, closure and defaults.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, final

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from torch import nn

from nnsight_compiler.ir.errors import ExperimentError
from nnsight_compiler.ir.lines import lines_of
from nnsight_compiler.runtime.replacing import _StandIn

Operation = Callable[..., Any]
"""`(name, function, *args, **kwargs)`: what stands in the place of a call. For an assignment the function is the
identity, for `x += v` the operator, called with `x` and `v`."""

_OPERATION, _IDENTITY, _OPERATOR = "_operation_", "_identity_", "_operator_"
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


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The forward that a module computes with: without what runs have put in its place, or accelerate around it."""
    found: Any = vars(module).get("_old_forward") or module.forward
    return found.plain if isinstance(found, _StandIn) else found


# --- reading a function ---


@final
@dataclass(frozen=True, slots=True)
class _Definition:
    """A function's source, parsed. `names` are those of the operations, by the identity of their nodes."""

    module: cst.Module
    node: cst.FunctionDef
    names: dict[int, str]
    listing: Listing
    first_line: int


_definitions: dict[tuple[CodeType, str], _Definition] = {}
_codes: dict[tuple[CodeType, str, frozenset[str]], CodeType] = {}
_lock = threading.RLock()


def listing(function: Callable[..., Any]) -> Listing:
    """The operations of a function, or of the function within its decorators.

    Raises:
        NoSourceError: there is no Python source.
    """
    return _definition(_unwrapped(function)[0]).listing


def _definition(function: FunctionType) -> _Definition:
    key = function.__code__, function.__code__.co_filename
    with _lock:
        if key not in _definitions:
            _definitions[key] = _read(function)
        return _definitions[key]


def _read(function: FunctionType) -> _Definition:
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
    counts: dict[str, int] = {}
    found: list[str] = []
    places: dict[str, int] = {}
    calls: set[str] = set()
    for stem, part in _operations(node.body):
        number = counts.get(stem, 0)
        counts[stem] = number + 1
        name = f"{stem}_{number}"
        names[id(part)] = name
        found.append(name)
        places[name] = positions[part].start.line - (2 if indented else 1)
        if isinstance(part, cst.Call) and not _looks_at_frames(part):
            calls.add(name)
    return _Definition(
        module.module,
        node,
        names,
        Listing(tuple(found), places, text, frozenset(calls)),
        first - (1 if indented else 0),
    )


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


# --- writing it anew ---


def rewritten(function: Callable[..., Any], names: frozenset[str], operation: Operation) -> Callable[..., Any]:
    """The same function, with `operation` in the place of these operations of it. Decorators around it stay.

    Raises:
        NoSourceError: there is no Python source.
    """
    inner, wrappers, receiver = _unwrapped(function)
    definition = _definition(inner)
    key = inner.__code__, inner.__code__.co_filename, names
    with _lock:
        if key not in _codes:
            _codes[key] = _compiled(definition, inner, names)
        code = _codes[key]
    own = {_OPERATION: operation, _IDENTITY: _identity, _OPERATOR: operator}
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
    closure = tuple(CellType(own[name]) if name in own else cells[name] for name in code.co_freevars)
    made = _like(inner, code, closure)
    for wrapper, index in reversed(wrappers):
        around = list(wrapper.__closure__ or ())
        around[index] = CellType(made)
        made = _like(wrapper, wrapper.__code__, tuple(around))
    return made if receiver is None else MethodType(made, receiver)


def _identity(value: Any) -> Any:
    return value


def _like(function: FunctionType, code: CodeType, closure: tuple[CellType, ...]) -> FunctionType:
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure or None)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__ = function.__qualname__
    made.__dict__.update(function.__dict__)
    return made


def _compiled(definition: _Definition, function: FunctionType, names: frozenset[str]) -> CodeType:
    """The code of a definition with these operations rewritten, within functions and a class such as it stood in: so
    free variables, `super()` and private names stay what they are."""
    wanted = {node: name for node, name in definition.names.items() if name in names}
    node: Any = definition.node.visit(_Rewriting(wanted))
    node = node.with_changes(decorators=[], leading_lines=[], lines_after_decorators=[])
    module = definition.module.deep_replace(definition.node, node)
    (statement,) = ast.parse(module.code).body
    made: Any = statement.body[0] if isinstance(statement, ast.If) else statement
    shift = definition.first_line - 1 + _lines_before(definition)
    ast.increment_lineno(made, shift)
    parameters = [*function.__code__.co_freevars, _OPERATION, _IDENTITY, _OPERATOR]
    body: list[ast.stmt] = [made]
    owner = function.__qualname__.rpartition(".")[0].rpartition(".")[2]
    if owner.isidentifier():
        body = [ast.ClassDef(name=owner, bases=[], keywords=[], body=body, decorator_list=[])]
    arguments = ast.arguments(
        posonlyargs=[], args=[ast.arg(arg=name) for name in parameters], kwonlyargs=[], kw_defaults=[], defaults=[]
    )
    outer = ast.FunctionDef(name="_outside_", args=arguments, body=body, decorator_list=[])
    tree = ast.fix_missing_locations(ast.Module(body=[outer], type_ignores=[]))
    code = compile(tree, function.__code__.co_filename, "exec", flags=_future(function.__code__), dont_inherit=True)
    return _nested(code, function.__code__.co_name)


def _lines_before(definition: _Definition) -> int:
    """How many lines of decorators and comments stood before the `def`."""
    text = definition.listing.text.split("\n")
    name = definition.node.name.value
    return next(
        number for number, line in enumerate(text) if line.lstrip().startswith((f"def {name}", f"async def {name}"))
    )


def _future(code: CodeType) -> int:
    import __future__

    return code.co_flags & __future__.annotations.compiler_flag


def _nested(code: CodeType, name: str) -> CodeType:
    """The first function of that name in some code, however deep."""
    for part in code.co_consts:
        if isinstance(part, CodeType):
            if part.co_name == name:
                return part
            try:
                return _nested(part, name)
            except LookupError:
                continue
    raise LookupError(name)


class _Rewriting(cst.CSTTransformer):
    """Puts calls of `_operation_` in the place of some operations."""

    def __init__(self, wanted: dict[int, str]) -> None:
        super().__init__()
        self.wanted = wanted

    def on_leave(self, original_node: Any, updated_node: Any) -> Any:
        name = self.wanted.get(id(original_node))
        match updated_node:
            case cst.Call() if name is not None:
                return _called(name, updated_node.func, list(updated_node.args), updated_node)
            case cst.Assign() | cst.AnnAssign() if name is not None:
                assert updated_node.value is not None
                return updated_node.with_changes(value=_assigned(name, updated_node.value))
            case cst.Element() if name is not None:
                return updated_node.with_changes(value=_assigned(name, updated_node.value))
            case cst.AugAssign() if name is not None:
                function = cst.Attribute(cst.Name(_OPERATOR), cst.Name(name.rpartition("_")[0].rpartition("_")[2]))
                given = [cst.Arg(updated_node.target), cst.Arg(_closed(updated_node.value))]
                made = _called(name, function, given, None)
                return cst.Assign([cst.AssignTarget(updated_node.target)], made)
        return updated_node


def _called(name: str, function: cst.BaseExpression, given: Sequence[cst.Arg], call: cst.Call | None) -> cst.Call:
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    first = [
        cst.Arg(cst.SimpleString(repr(name)), comma=comma),
        cst.Arg(function, comma=comma if given else cst.MaybeSentinel.DEFAULT),
    ]
    given = [each.with_changes(value=_closed(each.value, tuples=False)) for each in given]
    given = [
        each.with_changes(comma=comma) if each.comma is cst.MaybeSentinel.DEFAULT and each is not given[-1] else each
        for each in given
    ]
    made = cst.Call(cst.Name(_OPERATION), [*first, *given])
    if call is None:
        return made
    return made.with_changes(lpar=call.lpar, rpar=call.rpar, whitespace_before_args=call.whitespace_before_args)


def _assigned(name: str, value: cst.BaseExpression) -> cst.Call:
    return _called(name, cst.Name(_IDENTITY), [cst.Arg(_closed(value))], None)


def _closed(value: cst.BaseExpression, tuples: bool = True) -> cst.BaseExpression:
    """An expression in parentheses where it could not be an argument beside others without them."""
    bare = (cst.GeneratorExp, cst.Tuple, cst.Yield, cst.NamedExpr) if tuples else (cst.GeneratorExp,)
    if isinstance(value, bare) and not value.lpar:
        return value.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    return value


# --- decorators, methods, objects that are called ---


def _unwrapped(function: Callable[..., Any]) -> tuple[FunctionType, list[tuple[FunctionType, int]], Any]:
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
        node = _definition(function).node
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
