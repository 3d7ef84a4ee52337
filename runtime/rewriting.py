"""Functions of a model rewritten so that what they do can be seen and changed, operation by operation.

    hidden = torch.relu(self.fc1(x))
        ──▶
    hidden = _operation_("torch_relu_0", torch.relu, _operation_("self_fc1_0", self.fc1, x))

Only the operations that are asked for are rewritten, on their own lines, so that tracebacks name the lines of the
model's file. The function itself stays as it is: a second one is made, with the same globals, closure and defaults.
"""

from __future__ import annotations

import ast
import operator
import threading
from collections.abc import Callable, Sequence
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import libcst as cst

from nnsight_compiler.runtime.source_operations import Definition, definition_of, unwrapped

Operation = Callable[..., Any]
"""`(name, function, *args, **kwargs)`: what stands in the place of a call. For an assignment the function is the
identity, for `x += v` the operator, called with `x` and `v`."""

_OPERATION, _IDENTITY, _OPERATOR = "_operation_", "_identity_", "_operator_"
_codes: dict[tuple[CodeType, str, frozenset[str]], CodeType] = {}
_lock = threading.RLock()


def rewritten(function: Callable[..., Any], names: frozenset[str], operation: Operation) -> Callable[..., Any]:
    """The same function, with `operation` in the place of these operations of it. Decorators around it stay.

    Raises:
        NoSourceError: there is no Python source.
    """
    inner, wrappers, receiver = unwrapped(function)
    definition = definition_of(inner)
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


def _compiled(definition: Definition, function: FunctionType, names: frozenset[str]) -> CodeType:
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


def _lines_before(definition: Definition) -> int:
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
