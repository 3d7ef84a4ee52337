"""Which variables need merging, carrying, or memory: liveness over the control flow of one function.

`scopes` records, in Python's order of evaluation, the events that matter to variables (uses, assignments, jumps) in a
tree of sequences, branches, loops and guarded sections. One walk up the tree finds what each part uses and surely
assigns, one walk down finds what is live after it. Both are linear in the size of the function.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal as OneOf
from typing import final

NEVER = 1 << 62


@final
@dataclass(eq=False, slots=True)
class Variable:
    """A local variable of one scope.

    bound: some statement of its own scope assigns it, or it is a parameter.
    cell: it is not an SSA value: it lives in memory, or belongs to another scope.
    deleted: some `del` may leave it unassigned.
    changed_inside: a nested function assigns it (`nonlocal`).
    """

    name: str
    order: int
    bound: bool = False
    cell: bool = False
    deleted: bool = False
    changed_inside: bool = False
    last_assigned: int = -1
    first_captured: int = NEVER
    assigning_loops: set[int] = field(default_factory=set)
    capturing_loops: set[int] = field(default_factory=set)
    assigning_sections: set[int] = field(default_factory=set)
    uses: int = 0
    uses_in_section: dict[int, int] = field(default_factory=dict)

    def outlives_a_change(self) -> bool:
        """Whether a closure that captured it may see a later assignment, or an exception may pass between an
        assignment and a use."""
        captured = self.first_captured != NEVER
        return (
            (captured and self.changed_inside)
            or (captured and self.last_assigned > self.first_captured)
            or bool(self.assigning_loops & self.capturing_loops)
            or any(self.uses_in_section.get(section, 0) < self.uses for section in self.assigning_sections)
        )


@final
@dataclass(frozen=True, slots=True)
class Use:
    """The variable is read, or captured by a closure."""

    variable: Variable


@final
@dataclass(frozen=True, slots=True)
class Define:
    """The variable is assigned or deleted; not `certain` where a part of an expression may be skipped."""

    variable: Variable
    certain: bool = True


@final
@dataclass(frozen=True, slots=True)
class Leave:
    """Control goes elsewhere."""

    target: OneOf["break", "continue", "exit"]


@final
@dataclass(eq=False, slots=True)
class Branch:
    """An `if`. `merged`: the variables that either path assigns and something after it uses."""

    paths: tuple[list[Event], list[Event]]
    assigned: set[Variable] = field(default_factory=set)
    merged: set[Variable] = field(default_factory=set)


@final
@dataclass(eq=False, slots=True)
class Loop:
    """A `for` (its head assigns the target) or a `while` (its head is the condition, left from when false).

    carried: the variables that the loop assigns and that the next round or the code after the loop uses.
    endless: the head never ends the loop.
    """

    head: list[Event]
    body: list[Event]
    orelse: list[Event]
    tests: bool
    endless: bool
    assigned: set[Variable] = field(default_factory=set)
    used: set[Variable] = field(default_factory=set)
    assigned_by_head: set[Variable] = field(default_factory=set)
    carried: set[Variable] = field(default_factory=set)


@final
@dataclass(eq=False, slots=True)
class Guarded:
    """A statement whose sections an exception may end at any point: `try`, a `with` that may swallow exceptions."""

    sections: list[list[Event]]


Event = Use | Define | Leave | Branch | Loop | Guarded


@final
@dataclass(slots=True)
class Summary:
    """What a sequence does: the variables it may use before assigning them, those it may assign, and for each way out
    (`next`, `break`, `continue`) those that it surely assigned on the way."""

    used: set[Variable] = field(default_factory=set)
    assigned: set[Variable] = field(default_factory=set)
    exits: dict[str, set[Variable]] = field(default_factory=dict)

    def join(self, way: str, surely: set[Variable]) -> None:
        """Adds one more path to a way out."""
        known = self.exits.get(way)
        self.exits[way] = set(surely) if known is None else known & surely


def solve(events: list[Event], live_at_end: Iterable[Variable] = ()) -> tuple[set[Variable], set[Variable]]:
    """Fills in the branches and loops. Returns what is live at the start, and what is surely assigned at the end."""
    surely = _summarise(events).exits.get("next", set())
    return _propagate(events, set(live_at_end), set(), set()), surely


def _summarise(events: list[Event]) -> Summary:
    result = Summary()
    surely: set[Variable] | None = set()
    for event in events:
        match event:
            case Use(variable=variable):
                if surely is not None and variable not in surely:
                    result.used.add(variable)
                continue
            case Define(variable=variable, certain=certain):
                result.assigned.add(variable)
                if surely is not None and certain:
                    surely.add(variable)
                continue
            case Leave(target=target):
                if surely is not None and target != "exit":
                    result.join(target, surely)
                surely = None
                continue
            case Branch():
                inner = _summarise_branch(event)
            case Loop():
                inner = _summarise_loop(event)
            case Guarded():
                inner = _summarise_guarded(event)
        result.assigned |= inner.assigned
        if surely is None:
            continue
        result.used |= inner.used - surely
        for way in ("break", "continue"):
            if way in inner.exits:
                result.join(way, surely | inner.exits[way])
        if "next" in inner.exits:
            surely |= inner.exits["next"]
        else:
            surely = None
    if surely is not None:
        result.exits["next"] = surely
    return result


def _summarise_branch(branch: Branch) -> Summary:
    result = Summary()
    for path in branch.paths:
        inner = _summarise(path)
        result.used |= inner.used
        result.assigned |= inner.assigned
        for way, surely in inner.exits.items():
            result.join(way, surely)
    branch.assigned = result.assigned
    return result


def _summarise_loop(loop: Loop) -> Summary:
    head, body, orelse = _summarise(loop.head), _summarise(loop.body), _summarise(loop.orelse)
    in_head = head.exits.get("next", set())
    after_head = in_head if loop.tests else set[Variable]()
    result = Summary(head.used | (body.used - in_head), head.assigned | body.assigned | orelse.assigned)
    if "break" in body.exits:
        result.join("next", in_head | body.exits["break"])
    if not loop.endless:
        result.used |= orelse.used - after_head
        for way, surely in orelse.exits.items():
            result.join(way, surely | after_head)
    loop.assigned, loop.used, loop.assigned_by_head = result.assigned, result.used, head.assigned
    return result


def _summarise_guarded(guarded: Guarded) -> Summary:
    result = Summary()
    for number, section in enumerate(guarded.sections):
        inner = _summarise(section)
        result.used |= inner.used
        result.assigned |= inner.assigned
        for variable in inner.used & inner.assigned:
            variable.cell = True  # its value may come from an earlier round of a loop around the statement
        for way in inner.exits:
            result.join(way, set())
        if not number:
            result.join("next", set())
    return result


def _propagate(
    events: list[Event], live: set[Variable], at_break: set[Variable], at_continue: set[Variable]
) -> set[Variable]:
    for event in reversed(events):
        match event:
            case Use(variable=variable):
                live.add(variable)
            case Define(variable=variable, certain=certain):
                if certain:
                    live.discard(variable)
            case Leave(target=target):
                live = set({"break": at_break, "continue": at_continue, "exit": set[Variable]()}[target])
            case Branch(paths=(then, orelse)):
                event.merged = event.assigned & live
                live = _propagate(then, set(live), at_break, at_continue) | _propagate(
                    orelse, live, at_break, at_continue
                )
            case Loop():
                live = _propagate_loop(event, live, at_break, at_continue)
            case Guarded(sections=sections):
                before = set(live)
                for section in sections:
                    before |= _propagate(section, set(live), at_break, at_continue)
                live = before
    return live


def _propagate_loop(
    loop: Loop, after: set[Variable], at_break: set[Variable], at_continue: set[Variable]
) -> set[Variable]:
    leaving = set() if loop.endless else _propagate(loop.orelse, set(after), at_break, at_continue)
    next_round = loop.used | leaving | after
    loop.carried = loop.assigned & next_round
    inside = _propagate(loop.body, set(next_round), after, next_round)
    if loop.tests:
        loop.carried |= loop.assigned_by_head & (inside | leaving)  # they pass from the condition to the body
        return _propagate(loop.head, inside | leaving, at_break, at_continue)
    return _propagate(loop.head, inside, at_break, at_continue) | leaving
