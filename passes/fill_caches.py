"""Makes the reads of what a cache is to hold, and the records that put copies of them into it.

    forward %f = trace %model(%prompt)            forward %f = trace %model(%prompt)
      %c = cache %model named ('h.0',) …            %c = cache %model named ('h.0',) …
      write %model@h.0 output = 0          ──▶      write %model@h.0 output = 0
                                                    %0 = read %model@h.0 output
                                                    record %c['h.0'] output = %0

Legal, since nothing is added but reads. They stand at the end of the body, and source order rules within a site: so a
cache holds what the model went on with after all that the body writes, wherever `tracer.cache(…)` stands. Of a module
that the forward calls several times every call is recorded. Modules that were named must run; of all others, those that
this forward does not run are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import nn

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import TERMINATORS, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import rewrite, walk
from nnsight_compiler.ir.values import Literal, Module, Operand, Tuple, Value
from nnsight_compiler.passes.sites import Order, Orders

_START, _OPEN = Literal(0), Literal(None)


Modules = Callable[[ops.Forward], Mapping[str, nn.Module]]
"""Gives the modules of the model that a forward runs, by their paths."""


def fill_caches(program: Program, orders: Orders, modules: Modules) -> Program:
    """The program with the reads and records of its caches."""
    if not any(isinstance(op, ops.Cache) for op in program.walk()):
        return program
    builder = Builder(value.name for value in program.values())

    def filled(op: Op) -> Op:
        if not isinstance(op, ops.Forward):
            return rewrite(op, region=inside)
        caches = [each for each in walk(op.body) if isinstance(each, ops.Cache)]
        if not caches:
            return op
        order, runnable = orders(op), [path for path, module in modules(op).items() if _has_forward(module)]
        made: list[Op] = []
        for cache in caches:
            step = builder.fresh("step") if op.method == "generate" else None
            records = tuple(_records(cache, order, runnable, builder, step))
            if step is None:
                made += records
            else:
                body = Region((step,), records)
                made.append(ops.Steps(op.result, _START, _OPEN, body, rows=cache.rows, span=cache.span))
        end = len(op.body.ops)
        if op.body.ops and isinstance(op.body.ops[-1], TERMINATORS):
            end -= 1
        return replace(op, body=replace(op.body, ops=(*op.body.ops[:end], *made, *op.body.ops[end:])))

    def inside(region: Region) -> Region:
        return Region(region.parameters, tuple(map(filled, region.ops)))

    return replace(program, body=inside(program.body))


def _records(cache: ops.Cache, order: Order, runnable: list[str], builder: Builder, step: Value | None) -> Iterator[Op]:
    """The reads and records of one cache."""
    assert isinstance(cache.model, Value), "a model is a value"
    named = _texts(cache.named)
    others = runnable if cache.others == _OPEN else _texts(cache.others)
    for path in dict.fromkeys((*named, *(path for path in others if path in runnable and order.count(path)))):
        count = order.count(path)
        for call in range(count) if count > 1 else (None,):
            for port in _texts(cache.ports):
                result = builder.fresh()
                module = Module(cache.model, path)
                known = _port(port)
                yield ops.Read(result, module, known, call, cache.rows, span=cache.span)
                yield ops.Record(cache.result, Literal(path), known, result, call, step, span=cache.span)


def _has_forward(module: nn.Module) -> bool:
    """Whether a module can run: a list of modules cannot."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _texts(operand: Operand) -> list[str]:
    assert isinstance(operand, Tuple), "a cache says which modules it holds"
    return [part.value for part in operand.parts if isinstance(part, Literal) and isinstance(part.value, str)]


def _port(text: str) -> ops.Port:
    return "output" if text == "output" else "inputs"
