"""A program as a graph of ops, for scheduling, dead code, reports of cycles and drawings.

Nodes are numbers: the places of the ops in `Program.walk()`, nested ones too. Each has `op` and `parent` (the number of
the op whose region holds it, or `None`). Each edge has a `kind` and goes from an op to one that must come after it:

- `data`: the second uses the value `value` of the first. The parameters of a region belong to the op that owns it.
- `memory`: both touch the storage `value`, and one of them may write to it. Storage is told apart conservatively: all
  that is reached from one value by attributes, items and calls may be shared. A resolved module is a place of its own.
- `effect`: source order between neighbours among the ops that may run unknown code or take part in a model's run.

Every edge goes forward in source order, so the graph has no cycles as it stands; rewrites may add edges that make some.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import pairwise

import networkx as nx

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Closure, Effect, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, operands, regions, used, walk
from nnsight_compiler.ir.types import TensorType
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Tuple, Unbound, Value

Storage = Hashable
"""A value's name, or a tuple: `("site", model, path)`, `("global", name)`."""

_ORDERED = Effect.CALLS | Effect.MODEL
_WRITES = Effect.WRITES | Effect.CALLS
_LOOKS = (ops.If, ops.For, ops.Format, ops.Return, ops.Emit, ops.Raise)
"""Ops without a declared effect of their own, or with control alone, that look into what they are given."""


def declared_effects(op: Op) -> Effect:
    """What the op's class says that it may do; besides, some look into what they are given, and `+=` changes it."""
    if isinstance(op, ops.Operator) and op.in_place:
        return op.effects | Effect.WRITES
    return op.effects | (Effect.READS if isinstance(op, _LOOKS) else Effect.NONE)


def program_graph(program: Program, effects: Callable[[Op], Effect] = declared_effects) -> nx.MultiDiGraph:
    """The program as a graph of ops (see above).

    effects: what an op may do. Passes that know more of a call than that it is one say so here.
    """
    graph = nx.MultiDiGraph(name=program.name)
    _add_nodes(graph, program.body, None)
    _add_data_edges(graph)
    _add_memory_edges(graph, effects)
    ordered = [node for node, op in graph.nodes(data="op") if effects(op) & _ORDERED]
    graph.add_edges_from(pairwise(ordered), kind="effect")
    return graph


def edges_of(graph: nx.MultiDiGraph, *kinds: str) -> nx.MultiDiGraph:
    """The part of a program's graph that has the edges of these kinds, with every node."""
    return nx.subgraph_view(graph, filter_edge=lambda *edge: graph.edges[edge]["kind"] in kinds)


def _add_nodes(graph: nx.MultiDiGraph, region: Region, parent: int | None) -> None:
    for op in region.ops:
        node = graph.number_of_nodes()
        graph.add_node(node, op=op, parent=parent)
        for inner in regions(op):
            _add_nodes(graph, inner, node)


def _add_data_edges(graph: nx.MultiDiGraph) -> None:
    makers: dict[str, int] = {}
    for node, op in graph.nodes(data="op"):
        for value in used(op):
            if value.name in makers:
                graph.add_edge(makers[value.name], node, kind="data", value=value.name)
        makers.update((value.name, node) for value in _made(op))


def _made(op: Op) -> Iterator[Value]:
    yield from defined(op)
    if isinstance(op, Closure):
        yield from (parameter.value for parameter in op.parameters)
    for region in regions(op):
        yield from region.parameters


def _add_memory_edges(graph: nx.MultiDiGraph, effects: Callable[[Op], Effect]) -> None:
    shared = _shared_storage(op for _, op in graph.nodes(data="op"))
    writers: dict[Storage, int] = {}
    readers: dict[Storage, list[int]] = {}
    for node, op in graph.nodes(data="op"):
        may = effects(op)
        if not may & (Effect.READS | _WRITES):
            continue
        written = {shared.get(each, each) for each in _written(op)} if may & _WRITES else set()
        for storage in dict.fromkeys(shared.get(each, each) for each in (*_touched(op), *_written(op))):
            earlier = [writers[storage]] if storage in writers else []
            if storage in written:
                earlier = readers.pop(storage, []) or earlier
                writers[storage] = node
            else:
                readers.setdefault(storage, []).append(node)
            graph.add_edges_from(((each, node) for each in earlier), kind="memory", value=storage)


def _touched(op: Op) -> Iterator[Storage]:
    """The storage that an op with effects may read or write."""
    if isinstance(op, ops.Global):
        yield (op.scope, op.name)
    for operand in _looked_into(op):
        yield from _storage(operand)
    yield from (value.name for value in defined(op))


def _written(op: Op) -> Iterator[Storage]:
    """The storage that an op which writes may write; the rest of what it touches it only reads."""
    match op:
        case ops.SetGlobal(scope=scope, name=name):
            yield (scope, name)
        case ops.SetAttribute(object=changed) | ops.SetItem(object=changed) | ops.Delete(object=changed):
            yield from _storage(changed)
        case (
            ops.Store(cell=changed) | ops.Write(module=changed) | ops.Skip(module=changed) | ops.SetGrad(value=changed)
        ):
            yield from _storage(changed)
        case ops.Operator(operands=(changed, *_)):
            yield from _storage(changed)
        case _:
            yield from _touched(op)


def _looked_into(op: Op) -> Iterator[Operand]:
    match op:
        case ops.Call(arguments=arguments, target=str()):
            # A known function has no state of its own.
            yield from (argument.value for argument in arguments)
        case _:
            yield from operands(op)


def _storage(operand: Operand) -> Iterator[Storage]:
    match operand:
        case Value(name=name):
            yield name
        case Module(model=model, path=path):
            yield ("site", model.name, path)
        case Tuple(parts=parts):
            for part in parts:
                yield from _storage(part)
        case Slice() | Literal() | Unbound():
            return


def _shared_storage(found: Iterator[Op]) -> dict[Storage, Storage]:
    """For each storage, the one that stands for all that may be shared with it."""
    aliases = nx.Graph()
    for op in found:
        nx.add_path(aliases, [*(value.name for value in _made(op)), *_held(op)])
    together: dict[Storage, Storage] = {}
    for component in nx.connected_components(aliases):
        together.update(dict.fromkeys(component, min(component, key=repr)))
    return together


def _held(op: Op) -> Iterator[Storage]:
    """The storage that what an op makes, or changes, may share or hold."""
    sources: Iterable[Operand] = ()
    match op:
        case ops.Operator(in_place=False) | ops.Format() | ops.Save(copy=True) | ops.SetGlobal():
            return
        case ops.Global(scope=scope, name=name):
            yield (scope, name)
        case ops.Attribute(object=owner) | ops.Item(object=owner):
            sources = (owner,)
        case ops.SetItem(object=Value(type=TensorType())):
            return
        case ops.SetItem(object=owner, value=value):
            sources = (owner, value)
        case ops.SetAttribute() | ops.Store() | ops.Write() | ops.Skip():
            sources = operands(op)
        case _ if any(_made(op)):
            sources = _looked_into(op)
    inside = [inner for region in regions(op) for inner in walk(region)]
    ends = [inner for inner in inside if isinstance(op, Closure) or isinstance(inner, ops.TERMINATORS)]
    for operand in (*sources, *(operand for end in ends if any(_made(op)) for operand in operands(end))):
        yield from _storage(operand)
