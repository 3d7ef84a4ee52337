"""When the entries of a forward run: at the earliest site where all that they need exists.

What reads or writes a site runs there. A write that needs what only a later site gives is refused, with the cycle.
"""

from __future__ import annotations

import math
from typing import NoReturn

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.passes.entries import BEFORE, Body, Entry
from nnsight_compiler.passes.moments import first_step, last_step
from nnsight_compiler.passes.sites import RESULT, Place, locate, place_of


class Schedule(Body):
    """Gives each entry of a forward its time."""

    def _time(self, entry: Entry) -> None:
        op = self.originals.get(id(entry.op), entry.op)
        if not entry.merge:
            entry.pin = self._pin(entry, op)
        if entry.pin is not None and entry.pin.time == RESULT:  # there is one, whatever steps are around
            entry.steps, entry.frames = None, tuple(each for each in entry.frames if not isinstance(each.op, ops.Steps))
        moment = max((entry.after(need) for need in entry.needs), default=(0, BEFORE))
        if moment[1] == BEFORE and not entry.merge and self._changes(op) & self.given:
            moment = moment[0], self._start(op)  # the model has what it was given before the body changes it
        if entry.steps is not None and entry.pin is None and not _often(entry) and moment[0] > first_step(entry.steps):
            # What happens once, and touches no site, may wait for what it needs.
            entry.steps, entry.frames = None, entry.frames[1:]
        if entry.steps is not None:
            entry.step = first_step(entry.steps)
            moment = max(moment, (entry.step, self._start(op)))
            if isinstance(op, ops.Stop):
                before = [each.time for each in self.entries if each.order < entry.order and each.time != RESULT]
                moment = max(moment, (entry.step, max(before, default=BEFORE)))
                entry.closes = True
        elif entry.pin is not None:
            entry.step = self._step_of(entry, op, entry.pin)
        else:
            entry.step, entry.time = moment
            self._after_all(entry, op)
            if isinstance(op, ops.Stop):
                self._stop(entry)
            return
        time = moment[1] if entry.pin is None else entry.pin.time
        if moment > (entry.step, time):
            if isinstance(op, ops.Read):
                # To read changes nothing: under a condition that is known only later, it is done in any case.
                entry.frames = tuple(frame for frame in entry.frames if isinstance(frame.op, ops.Steps))
                entry.needs = []
            elif moment[0] > entry.step:
                self._refuse_steps(entry)
            else:
                self._refuse(entry)
        entry.time = time

    def _start(self, op: Op) -> int:
        """When the model begins to run."""
        start = locate("", "input", None, op.span, self.order)
        self.places[start.time] = start
        return start.time

    def _after_all(self, entry: Entry, op: Op) -> None:
        """Has what needs the last step of an open-ended loop run when there are no more steps."""
        if entry.step == math.inf:
            entry.time = RESULT
            self.places[RESULT] = locate("", "result", None, op.span, self.order)

    def _step_of(self, entry: Entry, op: Op, pin: Place) -> float:
        """The step of an access outside of all loops over steps: the first, or the one of the value that it changes."""
        if pin.time == RESULT:
            return math.inf
        if isinstance(op, (ops.Read, ops.Write, ops.Skip)):
            return 0
        return max((each.step for each in self._changed_reads(entry)), default=0)

    def _changed_reads(self, entry: Entry) -> list[Entry]:
        """The reads of the sites whose values an entry changes in place."""
        changed = set(self._sites(self._changes(entry.op)))
        waiting = [value for value in self._uses(entry) if changed.intersection(self.memory.named(value))]
        found: list[Entry] = []
        seen: set[str] = set()
        while waiting:
            value = waiting.pop()
            if value.name in seen or value.name not in self.makers:
                continue
            seen.add(value.name)
            maker = self.makers[value.name]
            if isinstance(maker.op, ops.Read) and changed.intersection(self.memory.named(maker.op.result)):
                found.append(maker)
            waiting += [each for each in self._uses(maker) if changed.intersection(self.memory.named(each))]
        return found

    def _stop(self, entry: Entry) -> None:
        """The forward ends at the last site of what precedes this in the source, after all that happens there."""
        moments = [(each.step, each.time) for each in self.entries if each.order < entry.order]
        entry.step, entry.time = max([(entry.step, entry.time), *moments])
        if entry.time == BEFORE:
            entry.time = self._start(entry.op)
        self.stops.append(entry)
        entry.closes = True

    def _check_stops(self) -> None:
        """Refuses accesses that a forward would have to come to after it was stopped."""
        for stop in self.stops:
            if any(isinstance(frame.op, ops.If) for frame in stop.frames):
                continue
            for entry in self.entries:
                if entry.pin is not None and (entry.step, entry.pin.time) > (stop.step, stop.time):
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
        self._check_steps(entry)
        self.writers[site.path, site.port, site.call].append(entry)
        return site

    def _check_steps(self, entry: Entry) -> None:
        """Refuses an in-place write to the value of a site at another step: the model has gone on."""
        reads = self._changed_reads(entry)
        wrong = [each for each in reads if not each.along(entry) and (entry.steps is not None or _often(each))]
        if not wrong and len({each.step for each in reads}) < 2:
            return
        read = (wrong or reads)[0]
        raise CompileError(
            [
                Diagnostic(
                    entry.op.span,
                    "this changes in place what was read at another step, and the model has gone on by then",
                    "read the value at the step at which it is changed",
                    ((read.op.span, f"it is read here, at {_steps(read)}"),),
                )
            ]
        )

    def _refuse_steps(self, entry: Entry) -> NoReturn:
        """The error of what needs a later step than its own."""
        need = max(entry.needs, key=entry.after)
        late = "the last step, of which it is not known which one it is" if need.last[0] == math.inf else _steps(need)
        raise CompileError(
            [
                Diagnostic(
                    entry.op.span,
                    f"this happens at {_steps(entry)}, but needs what happens at {late}",
                    "use it after the loop, for something that needs no earlier step; or take it from a generation of"
                    " its own",
                    ((need.op.span, "this is needed"),),
                )
            ]
        )

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


def _often(entry: Entry) -> bool:
    return entry.steps is not None and last_step(entry.steps) > first_step(entry.steps)


def _steps(entry: Entry) -> str:
    """The steps of an entry, for a message."""
    if entry.steps is None:
        return f"step {entry.step}" if entry.step != math.inf else "the end of the generation"
    first, last = first_step(entry.steps), last_step(entry.steps)
    if last == math.inf:
        return f"step {first} and each later one" if first else "every step"
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _spelled(place: Place) -> str:
    return f"whether `{place.path or 'the model'}` runs" if place.port == "skip" else _named(place)


def _named(place: Place) -> str:
    port = "input" if place.port == "skip" else place.port
    return f"the {port} of `{place.path or 'the model'}`"
