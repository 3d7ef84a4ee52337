"""Copies of values that outlive their site: the model, or a later write, may change the original.

A value of the model that is used after its site, put into something that lives on, or given to the model beside another
use is copied at its site, at the place in the source order where it is used, so that it is what it was there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.traverse import defined, regions, rewrite, used, walk
from nnsight_compiler.ir.values import Operand, Value, values_in
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.entries import Entry
from nnsight_compiler.passes.in_place_writes import in_place, targets
from nnsight_compiler.passes.memory import Fresh, Root
from nnsight_compiler.passes.schedule import Schedule


class Outliving(Schedule):
    """Has the entries of a forward take copies where they need them."""

    def _copy(self) -> None:
        for entry in list(self.entries):
            if isinstance(entry.op, (ops.Require, ops.Track)):
                continue  # a copy has another gradient
            for value in dict.fromkeys(self._uses(entry)):
                if not self._live(value):
                    continue
                maker = self.makers[value.name]
                if maker is entry or (maker.beside(entry) and not self._stores(entry, value)):
                    continue
                if isinstance(entry.op, ops.Skip) and self._passes_on(maker, entry):
                    continue
                if not entry.merge and self._changes(entry.op) & self._own(value):
                    continue  # what the program made is changed itself; copies are made after that
                entry.changes[value.name] = self._copied(value, entry.order[0])
        self._refuse_writes_to_copies()
        for entry in self.entries:
            if isinstance(entry.op, (ops.For, ops.While)):
                kept = rewrite(entry.op, region=self._kept_in)
                self.originals[id(kept)] = self.originals.get(id(entry.op), entry.op)
                entry.op = kept
        for entry in list(self.entries):
            if isinstance(entry.op, (ops.Write, ops.Skip)):
                for value in dict.fromkeys(values_in(entry.op.value)):
                    if self._shared(entry, value):
                        entry.changes[value.name] = self._given(entry, entry.changes.get(value.name, value))
        for name in self.placement.used_outside:
            if name in self.makers and self.placement.homes.get(name) == self.forward.result.name:
                left = self._value(name)
                if left is not None and self._live(left):
                    self.placement.leaving[name] = self._copied(left, len(self.entries) + len(self.copies))

    def _passes_on(self, maker: Entry, skip: Entry) -> bool:
        """Whether a skip hands on what its own module was given: nothing runs between the two sites, so that only a
        later line could change it."""
        place = self.places.get(maker.time)
        if place is None or skip.pin is None or maker.time != skip.pin.time - 1:
            return False
        writers = self.writers[place.path, place.port, place.call]
        return all(each.order < skip.order or isinstance(each.op, ops.Write) for each in writers)

    def _refuse_writes_to_copies(self) -> None:
        """Refuses in-place writes to what a list, a dict or an object gives back where a copy was put into it."""
        stored: dict[Root, Entry] = {}
        for entry in self.entries:
            for op in (entry.op, *self._inner(entry)):
                for value in self._put(op):
                    if self._live(value) and (op is not entry.op or value.name in entry.changes):
                        stored.update(dict.fromkeys(self._sites(self.memory.reachable(value)), entry))
        if not stored:
            return
        makers = {value.name: op for entry in self.entries for op in (entry.op, *self._inner(entry))
                  for value in (*defined(op), *(each for part in regions(op) for each in part.parameters))}  # fmt: skip
        for entry in self.entries:
            for op in (entry.op, *self._inner(entry)):
                if entry.merge or not in_place(op, self.memory):
                    continue
                for root in self._sites(targets(op, self.memory)) & stored.keys():
                    if stored[root].order >= entry.order:
                        continue
                    if any(root in self.memory.roots(value) and self._given_back(value, makers) for value in used(op)):
                        raise CompileError(
                            [
                                Diagnostic(
                                    op.span,
                                    "this writes to what was put into a container, which holds a copy: the model would"
                                    " not see it",
                                    "write to the value before it is put there, or index with a number that the source"
                                    " spells out",
                                    ((stored[root].op.span, "it is put there here"),),
                                )
                            ]
                        )

    def _given_back(self, value: Value, makers: dict[str, Op]) -> bool:
        """Whether a value of the model comes out of a container of the program's, rather than from its site."""
        op = makers.get(value.name)
        if op is None or isinstance(op, ops.Read):
            return False
        for base in used(op):
            roots = self.memory.roots(base)
            if roots and not self._sites(roots) and self._sites(self.memory.reachable(base)):
                return True
            if self._sites(roots) and self._given_back(base, makers):
                return True
        return False

    def _shared(self, write: Entry, value: Value) -> bool:
        """Whether what a write gives to the model, which may go on to change it in place, is also something else. A
        value that the program itself changes after the write stays one with the site."""
        if value.name in write.changes:
            return True
        roots = self.memory.named(value)
        if self._sites(roots):
            return False
        maker = self.makers.get(value.name)
        if write.steps is not None and maker is not None and not maker.along(write):
            return bool(roots)  # the next step gives it to the model again
        after = [each for each in self.entries if each.order > write.order or each.last > write.last]
        if any(
            not each.merge and in_place(each.op, self.memory) and targets(each.op, self.memory) & roots
            for each in after
        ):
            return False
        if any(not isinstance(root, Fresh) for root in roots) or value.name not in self.makers:
            return bool(roots)
        outside = (self._value(name) for name in self.placement.used_outside if name in self.makers)
        later = (used for each in after for used in self._uses(each))
        return any(self.memory.named(each) & roots for each in (*later, *outside) if each is not None)

    def _given(self, write: Entry, value: Value) -> Value:
        """A copy of a value for the model alone."""
        given = self.placement.builder.fresh(value.name)
        save = ops.Save(given, value, span=write.op.span)
        entry = Entry(save, (write.order[0], -1), write.frames, steps=write.steps, step=write.step, time=write.time)
        self.entries.append(entry)
        self.makers[given.name] = entry
        self.detached.add(given.name)
        return given

    def _value(self, name: str) -> Value | None:
        op = self.makers[name].op
        found = [value for value in defined(op) if value.name == name]
        return found[0] if found else None

    def _live(self, value: Value) -> bool:
        """Whether a value may be one that the model still holds, where it is made."""
        if value.name in self.detached or value.name not in self.makers:
            return False
        if not self._sites(self.memory.reachable(value)):
            return False
        maker = self.makers[value.name]
        if isinstance(maker.op, ops.Read) or any(isinstance(each, ops.Read) for each in self._inner(maker)):
            return True
        taken = [each for each in self._uses(maker) if each.name not in maker.changes]
        alive = any(self._live(each) for each in taken)
        if not alive:
            self.detached.add(value.name)
        return alive

    @staticmethod
    def _inner(entry: Entry) -> Iterator[Op]:
        if not entry.merge:
            for part in regions(entry.op):
                yield from walk(part)

    def _stores(self, entry: Entry, value: Value) -> bool:
        """Whether an op puts the value where it outlives its site: into a container, an object, a cell, a closure."""
        match entry.op:
            case ops.Build(result=result, kind="list" | "dict" | "set"):
                return self._outlives(result, entry)
            case ops.Call() as op:
                known = self.memory.origins.known(op)
                if known is None or known.behaviour is not Behaviour.CONTAINER:
                    return False
                return any(value in values_in(argument.value) for argument in op.arguments)
            case ops.SetItem(object=base) | ops.SetAttribute(object=base):
                stored = value in values_in(entry.op.value)
                return stored and not self._sites(self.memory.roots(base))
            case ops.Store() | ops.Cell() | ops.SetGlobal():
                return True
        return False

    def _kept_in(self, region: Region) -> Region:
        """A region of a loop, in which values of the model are copied where they are put into something."""
        made: list[Op] = []
        for op in region.ops:
            copies: dict[str, Value] = {}
            for value in self._put(op):
                if self._sites(self.memory.reachable(value)):
                    copies[value.name] = self.placement.builder.fresh(value.name)
                    made.append(ops.Save(copies[value.name], value, span=op.span))
            new = rewrite(op, region=self._kept_in)
            if copies:
                new = rewrite(new, operand=_taking(copies))
            made.append(new)
        return Region(region.parameters, tuple(made))

    def _put(self, op: Op) -> Iterator[Value]:
        """The values that an op puts into a container, an object or a global name."""
        match op:
            case ops.Call():
                known = self.memory.origins.known(op)
                if known is not None and known.behaviour is Behaviour.CONTAINER:
                    yield from dict.fromkeys(value for part in op.arguments for value in values_in(part.value))
            case ops.SetItem(object=base, value=value) | ops.SetAttribute(object=base, value=value):
                if not self._sites(self.memory.roots(base)) and not self.memory.origins.is_tensor(base):
                    yield from dict.fromkeys(values_in(value))
            case ops.SetGlobal(value=value):
                yield from dict.fromkeys(values_in(value))

    def _outlives(self, container: Value, maker: Entry) -> bool:
        """Whether a container is used after the site where it is made, or changed, or held by something else."""
        if container.name in self.placement.used_outside or self.memory.escaped(container):
            return True
        users = [each for each in self.entries if any(value == container for value in self._uses(each))]
        return not all(map(maker.beside, users))

    def _own(self, value: Value) -> frozenset[Root]:
        """The storages of the program's own that a value may be."""
        return frozenset(root for root in self.memory.roots(value) if isinstance(root, Fresh))

    def _copied(self, value: Value, before: int) -> Value:
        """A copy of a live value, made at its site, as it is before the op numbered `before`."""
        maker = self.makers[value.name]
        writes = [
            writer
            for root in self._sites(self.memory.reachable(value))
            for place in [self._place(root, maker.op.span)]
            for writer in self.writers[place.path, place.port, place.call]
            if maker.order[0] < writer.order[0] < before and not isinstance(writer.op, ops.Write)
        ]
        own = self._own(value)
        writes += [
            each
            for each in (self.entries if own else ())
            if maker.order[0] < each.order[0] < before and not each.merge and self._changes(each.op) & own
        ]
        after = max([maker, *writes], key=lambda each: each.order)
        late = max((maker, *writes), key=lambda each: each.last) if own else maker
        apart = not late.along(maker)
        frames = (
            tuple(frame for frame in maker.frames if not isinstance(frame.op, ops.Steps)) if apart else maker.frames
        )
        step, time = late.last if apart else (late.step, late.time)
        key = (value.name, after.order[0])
        if key not in self.copies:
            kept = self.placement.builder.fresh(value.name)
            self.copies[key] = kept
            save = ops.Save(kept, value, span=maker.op.span)
            steps = None if apart else maker.steps
            order = after.order[0], 1 + len(self.copies)
            entry = Entry(save, order, frames, steps=steps, step=step, time=time)
            entry.needs.append(maker)
            self.entries.append(entry)
            self.makers[kept.name] = entry
            self.detached.add(kept.name)
        return self.copies[key]


def _taking(copies: dict[str, Value]) -> Callable[[Value], Operand]:
    return lambda value: copies.get(value.name, value)
