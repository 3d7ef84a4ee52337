"""Containers that are filled and never looked at: a list, set or dict goes with the ops that fill it.

%l = list []
%0 = attribute %l.append                    both fillings of %l, which nothing else uses
%1 = call %0(%h) as method.append
"""

from __future__ import annotations

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.traverse import defined
from nnsight_compiler.ir.values import Literal, Value, values_in
from nnsight_compiler.passes.op_tree import Node, OpTree

EMPTY = frozenset(f"builtins.{name}" for name in ("list", "dict", "set")) | {"collections.deque"}
"""Calls without arguments that make an empty container."""

FILLING = frozenset(f"method.{name}" for name in ("append", "appendleft", "add", "insert", "clear"))
"""Methods by which a container is filled, and which cannot raise on one of its kind."""


def fillings_of_unused(tree: OpTree) -> set[Node]:
    """The ops which fill containers that nothing else uses."""
    found: set[Node] = set()
    for node in tree.nodes:
        if _makes_container(node.op):
            filling = _filling(tree, node, _is_dict(node.op))
            if filling is not None:
                found |= filling
    return found


def _makes_container(op: Op) -> bool:
    match op:
        case ops.Build(kind="list" | "dict" | "set") | ops.Cache():
            return True
        case ops.Call(target=target, arguments=()):
            return target in EMPTY
        case _:
            return False


def _filling(tree: OpTree, node: Node, dictionary: bool) -> set[Node] | None:
    """The ops that fill the container which this op defines; `None` if anything else is done with it."""
    found: set[Node] = set()
    (value,) = defined(node.op)
    for use in tree.uses.get(value.name, ()):
        inner: set[Node] | None = set()
        match use.op:
            case ops.Save():
                inner = _filling(tree, use, dictionary)
            case ops.Record():
                inner = {use}
            case ops.SetItem(object=base, index=Literal(), value=stored):
                inner = {use} if dictionary and base == value and stored != value else None
            case ops.Attribute(result=method):
                for call in tree.uses.get(method.name, ()):
                    inner = {*inner, call} if inner is not None and _fills(tree, call.op, method, value) else None
            case _:
                inner = None
        if inner is None:
            return None
        found |= inner
    return found


def _fills(tree: OpTree, op: Op, method: Value, container: Value) -> bool:
    if not isinstance(op, ops.Call) or op.target not in FILLING or op.function != method:
        return False
    given = {value for argument in op.arguments for value in values_in(argument.value)}
    stars = any(argument.star for argument in op.arguments)
    return not stars and op.result.name not in tree.uses and not given & {method, container}


def _is_dict(op: Op) -> bool:
    return (isinstance(op, ops.Build) and op.kind == "dict") or (
        isinstance(op, ops.Call) and op.target == "builtins.dict"
    )
