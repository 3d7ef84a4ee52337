"""The ops of a program at their places in its tree of regions, and which op makes and which ones use each value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast, final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import AnyOp, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, regions, used
from nnsight_compiler.ir.values import Value


@final
@dataclass(eq=False, slots=True)
class Node:
    """An op at its place.

    guarded: whether it stands inside a `try`.
    jumps: for a loop, the terminators that carry its values; for an `if`, its yields.
    """

    op: AnyOp
    parent: Node | None
    guarded: bool
    children: list[Node] = field(default_factory=list)
    jumps: list[Node] = field(default_factory=list)

    def descend(self) -> Iterator[Node]:
        """All nodes in its regions, at any depth."""
        for child in self.children:
            yield child
            yield from child.descend()

    def loop(self) -> Node:
        """The loop that a `break` or `continue` leads out of or back to."""
        around = self.parent
        while around is not None and not isinstance(around.op, (ops.For, ops.While)):
            around = around.parent
        assert around is not None, "the verifier lets `break` and `continue` stand in loops alone"
        return around


@final
class OpTree:
    """The tree of one program.

    top: the nodes of its body; `nodes`: all, in the order of the source.
    makers: the node that makes a value, by name, and the number of the value among its results, or among those that a
        loop carries; -1 for a parameter that is neither.
    stores: what puts something into a cell. uses: the nodes that use a value.
    from_model: the values that depend on one of the model's.
    """

    def __init__(self, program: Program) -> None:
        self.nodes: list[Node] = []
        self.makers: dict[str, tuple[Node, int]] = {}
        self.stores: dict[str, list[Node]] = {}
        self.uses: dict[str, list[Node]] = {}
        self.from_model: set[str] = set()
        self.top = self._build(program.body, None, False)

    def _build(self, region: Region, parent: Node | None, guarded: bool) -> list[Node]:
        return [self._add(cast(AnyOp, op), parent, guarded) for op in region.ops]

    def _add(self, op: AnyOp, parent: Node | None, guarded: bool) -> Node:
        node = Node(op, parent, guarded)
        self.nodes.append(node)
        for index, value in enumerate(defined(op)):
            self.makers[value.name] = (node, index)
        for value in used(op):
            self.uses.setdefault(value.name, []).append(node)
        if isinstance(op, (ops.Read, ops.Grad, ops.Forward, ops.Invoke)) or any(
            value.name in self.from_model for value in used(op)
        ):
            self.from_model |= {value.name for value in defined(op)}
        if isinstance(op, ops.Store) and isinstance(op.cell, Value):
            self.stores.setdefault(op.cell.name, []).append(node)
        if isinstance(op, (ops.For, ops.While)):
            for region in regions(op):
                first = 1 if isinstance(op, ops.For) and region is op.body else 0
                for index, value in enumerate(region.parameters):
                    # The item of a `for` has the index -1: it is no carried value.
                    self.makers[value.name] = (node, index - first)
        else:
            for region in regions(op):
                for value in region.parameters:
                    self.makers.setdefault(value.name, (node, -1))
        if isinstance(op, (ops.Continue, ops.Break)):
            node.loop().jumps.append(node)
        elif isinstance(op, ops.Yield) and parent is not None:
            parent.jumps.append(node)
        for region in regions(op):
            inside = guarded or (isinstance(op, ops.Try) and region is op.body)
            node.children += self._build(region, node, inside)
        return node
