"""When the entries of a forward run: at the earliest site where all that they need exists.

What reads or writes a site runs there. A write that needs what only a later site gives is refused, with the cycle.
"""

from __future__ import annotations

from typing import NoReturn

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.passes.entries import BEFORE, Body, Entry
from nnsight_compiler.passes.sites import Place, locate, place_of


class Schedule(Body):
    """Gives each entry of a forward its time."""

    def _time(self, entry: Entry) -> None:
        op = self.originals.get(id(entry.op), entry.op)
        if not entry.merge:
            entry.pin = self._pin(entry, op)
        entry.time = max((need.time for need in entry.needs), default=BEFORE)
        if entry.time == BEFORE and not entry.merge and self._changes(op) & self.given:
            start = locate("", "input", None, op.span, self.order)
            self.places[start.time] = start
            entry.time = start.time  # the model has what it was given before the body changes it
        if isinstance(op, ops.Stop):
            self._stop(entry)
        if entry.pin is None:
            return
        if entry.time > entry.pin.time and isinstance(op, ops.Read):
            # To read changes nothing: under a condition that is known only later, it is done in any case.
            entry.frames, entry.needs = (), []
        elif entry.time > entry.pin.time:
            self._refuse(entry)
        entry.time = entry.pin.time

    def _stop(self, entry: Entry) -> None:
        """The forward ends at the last site of what precedes this in the source, after all that happens there."""
        entry.time = max([entry.time, *(each.time for each in self.entries if each.order < entry.order)])
        if entry.time == BEFORE:
            start = locate("", "input", None, entry.op.span, self.order)
            self.places[start.time] = start
            entry.time = start.time
        self.stops.append(entry)
        entry.last = True

    def _check_stops(self) -> None:
        """Refuses accesses that a forward would have to come to after it was stopped."""
        for stop in self.stops:
            if any(isinstance(frame.op, ops.If) for frame in stop.frames):
                continue
            for entry in self.entries:
                if entry.pin is not None and entry.pin.time > stop.time:
                    raise CompileError(
                        [
                            Diagnostic(
                                entry.op.span,
                                f"the forward does not come to {_named(entry.pin)}: it is stopped before",
                                "write it before `tracer.stop()`: the forward ends after all that precedes that line",
                                ((stop.op.span, "the forward is stopped here"),),
                            )
                        ]
                    )

    def _pin(self, entry: Entry, op: Op) -> Place | None:
        """The site at which an op must run: the one that it reads or writes."""
        if isinstance(op, (ops.Read, ops.Write, ops.Skip)):
            found = place_of(op, self.order)
            self.places[found.time] = found
            if not isinstance(op, ops.Read):
                self.writers[found.path, found.port, found.call].append(entry)
            return found
        sites = self._changed(op)
        if not sites:
            return None
        if len(sites) > 1:
            first, second = sorted(sites, key=lambda site: site.time)[:2]
            raise CompileError(
                [
                    Diagnostic(
                        op.span,
                        f"this writes in place to what may be a value of `{first.path}` or of `{second.path}`",
                        "write to each site by its own name, or make a new value and assign it",
                    )
                ]
            )
        (site,) = sites
        self.writers[site.path, site.port, site.call].append(entry)
        return site

    def _refuse(self, entry: Entry) -> NoReturn:
        """The error of a write that needs what only a later site gives: both lines, and the way between them."""
        import networkx as nx  # a fifth of a second, for an error alone

        assert entry.pin is not None
        graph = nx.DiGraph()
        for each in self.entries:
            graph.add_edges_from((each, need) for need in each.needs)
        late = [
            each for each in nx.descendants(graph, entry) if each.pin is not None and each.pin.time > entry.pin.time
        ]
        source = min(late, key=lambda each: len(nx.shortest_path(graph, entry, each)))
        assert source.pin is not None
        graph.add_edge(source, entry)  # the model itself computes the later site from the earlier
        cycle = nx.shortest_path(graph, entry, source)
        here, there = _spelled(entry.pin), _spelled(source.pin)
        chain = [f"line {each.op.span.line}" for each in cycle]
        raise CompileError(
            [
                Diagnostic(
                    entry.op.span,
                    f"this changes {here}, but needs {there}, which the same forward computes only later:"
                    f" {' needs '.join(chain)}, and the model needs line {entry.op.span.line} before that",
                    "take the value from a forward of its own: run the model once for the value, and again with the"
                    " change",
                    ((source.op.span, f"{there} is read here"),),
                )
            ]
        )


def _spelled(place: Place) -> str:
    return f"whether `{place.path or 'the model'}` runs" if place.port == "skip" else _named(place)


def _named(place: Place) -> str:
    port = "input" if place.port == "skip" else place.port
    return f"the {port} of `{place.path or 'the model'}`"
