"""The graph view: who uses whose value, who shares storage, and what keeps source order."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, SearchStrategy
from random_examples import examples

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.graph import declared_effects, edges_of, program_graph
from nnsight_compiler.ir.ops import Effect, Op
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.program import Program


def edges(text: str, kind: str) -> set[tuple[int, int]]:
    lines = "".join(f"  {line}\n" for line in text.splitlines())
    graph = parse_program(f"function f(%a, %b, %model)\n{lines}").graph()
    return {(before, after) for before, after, found in graph.edges(data="kind") if found == kind}


def test_nodes_are_ops_in_source_order_with_their_parents() -> None:
    program = parse_program("function f(%a)\n  if %a\n  then\n    %0 = - %a\n  else\n    raise\n  return %a\n")
    graph = program.graph()
    assert [graph.nodes[node]["op"] for node in graph] == list(program.walk())
    assert [graph.nodes[node]["parent"] for node in graph] == [None, 0, 0, None]


def test_data_edges_go_from_definition_to_use() -> None:
    text = "%x = - %a\nfor %i in %x\n  %y = - %i\n  %z = %y + %x\nreturn (%x, %x)"
    assert edges(text, "data") == {(0, 1), (1, 2), (2, 3), (0, 3), (0, 4)}


MEMORY = [
    # A cell: a read after a write, a write after a read, two reads.
    ("%c = cell c = 0\n%x = load %c as c\n%y = load %c as c\nstore %c = 1", {(0, 1), (0, 2), (1, 3), (2, 3)}),
    # Views of one value share its storage; two values do not, whatever index they have in common.
    (
        "%x = item %a[%model]\n%y = item %b[%model]\nset_item %x[0] = 1\n%z = item %y[0]\n%w = item %a[1]",
        {(0, 2), (2, 4)},
    ),
    # Storing into a container makes what is stored reachable from it; into a tensor it copies.
    ("set_attr %a.x = %b\n%y = attr %b.y", {(0, 1)}),
    ("%t = item %a[0] : f32\nset_item %t[0] = %b\n%x = item %b[0]", {(0, 1)}),
    # What an operator makes is its own; what it changes in place is not.
    ("%x = %a + 1\nset_item %x[0] = 1\n%y = item %a[0]", {(0, 1)}),
    ("%x = %a += 1\nset_item %x[0] = 1\n%y = item %a[0]", {(0, 1), (1, 2)}),
    ("%x = %a += 1\n%y = item %a[0]", {(0, 1)}),
    # A copy is its own, and what is kept is not.
    ("%x = save %a\nset_item %a[0] = 1\n%y = item %x[0]", {(0, 1)}),
    ("%x = keep %a\nset_item %a[0] = 1\n%y = item %x[0]", {(0, 1), (1, 2)}),
    # A call may write to what it is given, and give it back; a known function has no storage of its own.
    ("%x = call %a(%b)\n%y = item %b[0]\n%z = item %x[0]", {(0, 1), (0, 2)}),
    ("%x = call %model(%a)\n%y = call %model(%b)", {(0, 1)}),
    ("%x = call %model(%a) as torch.exp\n%y = call %model(%b) as torch.exp", set()),
    # Values that leave a loop by a nested break may be what was put in.
    (
        "%x = for %i in %a carry %c = 0\n  if %i\n  then\n    break %b\n  continue %c\n"
        "set_item %x[0] = 1\n%y = item %b[0]",
        {(0, 4), (1, 4), (4, 5)},
    ),
    # A closure holds what it uses.
    ("%f = closure f()\n  return %b\n%x = call %f()\n%y = item %b[0]", {(1, 2), (2, 3)}),
    # Names outside the program.
    ("%x = global n\nset_global n = 1\n%y = global n\n%z = global m", {(0, 1), (1, 2)}),
    # Sites: each resolved module is a place of its own, and a live value belongs to its site.
    (
        "%x = read %model@h.0 output\n%y = read %model@h.1 output\nwrite %model@h.0 output = 0\nset_item %y[0] = 1",
        {(0, 2), (1, 3)},
    ),
    ("%x = read %model@h.0 output\n%y = read %model@h.0 output\nset_item %x[0] = 1", {(0, 2), (1, 2)}),
]


@pytest.mark.parametrize(("text", "expected"), MEMORY)
def test_memory_edges_order_what_may_share_storage(text: str, expected: set[tuple[int, int]]) -> None:
    assert edges(text, "memory") == expected


def test_effect_edges_keep_source_order_among_calls_and_models() -> None:
    text = "%0 = - %a\n%1 = call %a()\n%2 = - %a\nforward %f = trace %model()\n  stop %f\n%3 = import torch"
    assert edges(text, "effect") == {(1, 3), (3, 4), (4, 5)}


def test_a_pass_may_say_that_a_call_is_pure() -> None:
    program = parse_program("function f(%a)\n  %0 = call %a(%a)\n  %1 = call %a(%a)\n")

    def effects(op: Op) -> Effect:
        return Effect.NONE if isinstance(op, ops.Call) else declared_effects(op)

    assert program.graph().number_of_edges() == 2
    assert program_graph(program, effects).number_of_edges() == 0


def test_edges_of_keeps_kinds_and_all_nodes() -> None:
    graph = parse_program("function f(%a)\n  %0 = call %a()\n  %1 = call %0()\n").graph()
    data = edges_of(graph, "data")
    assert list(data.edges(data="kind")) == [(0, 1, "data")]
    assert set(data) == set(graph)


@examples(30)
@given(data=st.data())
def test_edges_go_forward_and_conflicts_are_ordered(programs: SearchStrategy[Program], data: DataObject) -> None:
    program = data.draw(programs)
    graph = program.graph()
    assert all(before < after for before, after in graph.edges())
    assert nx.is_directed_acyclic_graph(graph)

    # Two ops on one cell, one of which writes, are never free to change places.
    order = nx.transitive_closure_dag(nx.DiGraph(edges_of(graph, "memory")))
    touching = [
        (node, op.cell, isinstance(op, ops.Store))
        for node, op in graph.nodes(data="op")
        if isinstance(op, ops.Store | ops.Load)
    ]
    for before, cell, writes in touching:
        for after, other, writes_too in touching:
            if before < after and cell == other and (writes or writes_too) and hasattr(cell, "name"):
                assert order.has_edge(before, after)
