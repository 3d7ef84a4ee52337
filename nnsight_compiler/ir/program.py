"""A whole program: an experiment, an undecorated block, or a helper function, as IR."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final
from typing import Literal as OneOf

from nnsight_compiler.ir.ops import Op, Parameter, Region
from nnsight_compiler.ir.span import NOWHERE, Span
from nnsight_compiler.ir.traverse import definitions, walk
from nnsight_compiler.ir.values import Value

if TYPE_CHECKING:
    from networkx import MultiDiGraph


@final
@dataclass(frozen=True, slots=True)
class Program:
    """A function in IR.

    kind: `experiment` (a decorated function), `block` (an undecorated `with`; its parameters are the names that it
        reads from the frame around it, and it returns a tuple of the names in `exports`), `function` (a helper), or
        `stage` (the part of an experiment that depends on a value which only the run of what precedes it gives), or
        `edit` (the body of a `with model.edit()`; its parameters are the tracer, the model, and what it captures).
    target: the class of the model that the program was specialised to; empty before.
    given: what the program was specialised on, as text (`layer=3`), for the dump.
    passes: the passes that made this program, in order.
    exports: for a block, the names that go back to the frame, one for each part of the returned tuple.
    """

    name: str
    parameters: tuple[Parameter, ...]
    body: Region
    kind: OneOf["experiment", "block", "function", "stage", "edit"] = "experiment"
    target: str = ""
    given: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    span: Span = field(default=NOWHERE, compare=False, kw_only=True)

    def walk(self) -> Iterator[Op]:
        """Every op of the program, outer before inner, in source order."""
        return walk(self.body)

    def values(self) -> Iterator[Value]:
        """Every value that the program defines: parameters, results, parameters of regions."""
        yield from (parameter.value for parameter in self.parameters)
        yield from definitions(self.body)

    def graph(self) -> MultiDiGraph:
        """The program as a graph of ops: data, memory and effect edges (see `nnsight_compiler.ir.graph`)."""
        from nnsight_compiler.ir.graph import program_graph

        return program_graph(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what IPython asks for
        printer.text(str(self))

    def __str__(self) -> str:
        from nnsight_compiler.ir.printer import print_program

        return print_program(self)
