"""What a `with` item is, told from its text alone."""

from __future__ import annotations

from typing import Literal as OneOf

import libcst as cst

from nnsight_compiler.frontend.trees import dotted_name

ContextKind = OneOf["trace", "generate", "scan", "session", "invoke", "backward", "edit", "torch", "unknown"]


def kind_of(item: cst.WithItem) -> ContextKind:
    """The kind of a context: a method call of ours, one of torch's own contexts, or anything else, which may swallow
    exceptions."""
    match item.item:
        case cst.Call(func=cst.Attribute(attr=cst.Name(value=method)) as function):
            if dotted_name(function).startswith("torch."):
                return "torch"
            match method:
                case "trace" | "generate" | "scan" | "session" | "invoke" | "backward" | "edit":
                    return method
    return "unknown"


def opens_forward(kind: ContextKind) -> bool:
    """Whether the code in such a context takes part in a forward: that of an edit in each of the edited model's."""
    return kind in ("trace", "generate", "scan", "invoke", "edit")


def is_true(test: cst.BaseExpression) -> bool:
    """Whether a loop's condition is a constant that holds: `while True`, `while 1`."""
    match test:
        case cst.Name(value="True"):
            return True
        case cst.Integer():
            return test.evaluated_value != 0
    return False


def trace_item(node: cst.With) -> int | None:
    """The number of the first item that opens a forward, or a session of forwards."""
    for number, item in enumerate(node.items):
        kind = kind_of(item)
        if kind in ("trace", "generate", "scan") or (kind == "session" and _holds_trace(node)):
            return number
    return None


def _holds_trace(node: cst.With) -> bool:
    """Whether a forward is opened in a `with`: then a `.session()` that opens it is one of ours, and no database's."""
    left: list[cst.CSTNode] = [node]
    while left:
        each = left.pop()
        if isinstance(each, cst.WithItem) and kind_of(each) in ("trace", "generate", "scan"):
            return True
        left += each.children
    return False
