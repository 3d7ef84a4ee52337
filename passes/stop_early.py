"""Ends a forward at the last site that anything needs.

    forward %f0 = trace %model(%x)            forward %f0 = trace %model(%x) stops after %model@h.3 output
      at %model@h.3 output                      at %model@h.3 output
        %h = read %model@h.3 output     ──▶       %h = read %model@h.3 output
        %s = save %h                              %s = save %h
    return %s                                 return %s

Legal, since a placed program says all that it takes from a forward: what comes after the last site gives a result that
nobody takes. A forward without sites runs for its own sake and stays whole; so does one whose output is a site, and a
generation, whose next step needs the whole of this one.

Two things are known only to a run, which then goes on to the end: a model in training mode, whose layers change when
they run (the statistics of batch norm, a draw of dropout that shifts all later ones), and inputs of new shapes, on
which a module may run more often than it was seen to, so that the last site would be reached twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import rewrite
from nnsight_compiler.passes.remarks import Remarks
from nnsight_compiler.passes.sites import Orders

NAME = "stop_early"


def stop_early(
    program: Program, orders: Orders, remarks: Remarks, is_training: Callable[[ops.Forward], bool]
) -> Program:
    """The program, each forward of which says whether it ends at its last site."""

    def change(op: Op) -> Op:
        if not isinstance(op, ops.Forward):
            return rewrite(op, region=inside)
        last = ops.last_site(op)
        if op.method == "generate" or last is None or (last.module.path, last.port) == ("", "output"):
            return op
        rest = orders(op).begins_after(last.module.path, "output" if last.port == "output" else "input", last.call or 0)
        if rest is not None and is_training(op):
            why = f"the model is in training mode, in which a forward runs to its end: {rest} and what follows run"
            remarks.refused(NAME, op.span, why)
        elif rest is not None:
            site = f"{last.module.path or 'the model'} {last.port}"
            remarks.fired(NAME, op.span, f"ends after {site}: {rest} and what follows do not run")
        return replace(op, stops=True)

    def inside(region: Region) -> Region:
        return Region(region.parameters, tuple(map(change, region.ops)))

    return replace(program, body=inside(program.body))
