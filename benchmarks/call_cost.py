"""What a call of a compiled experiment costs beyond the bare forward, against hooks written by hand.

Prints one JSON document; `make bench` runs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import torch
from interleaved import as_dict, machine, race
from stack import BY_HAND, ROUNDS, STACKS, check_equal, make_stack
from torch import Tensor

from nnsight_compiler import NNsight, intervene

FACTOR, SLACK = 1.3, 15.0
"""The bound: at most 1.3 times what the hand hooks add, and 15 microseconds."""


@intervene
def save_one(model, x):  # type: ignore[no-untyped-def]
    with model.trace(x):
        hidden = model.layers[3].output
    return hidden


@intervene
def save_all(model, x):  # type: ignore[no-untyped-def]
    with model.trace(x):
        hidden = [layer.output for layer in model.layers]
    return hidden


@intervene
def write_one(model, x):  # type: ignore[no-untyped-def]
    with model.trace(x):
        model.layers[1].output[:] = 0
        result = model.output
    return result


OURS: dict[str, Callable[..., Tensor | list[Tensor]]] = {
    "save one layer": save_one,
    "save all four layers": save_all,
    "write one layer": write_one,
}


def measure(case: str, kind: str) -> dict[str, object]:
    """One case: bare forward, hand hooks and ours, interleaved."""
    model, x = make_stack(kind)
    wrapped = NNsight(model)
    hand, ours = partial(BY_HAND[case], model, x), partial(OURS[case], wrapped, x)
    check_equal(case, hand(), ours())
    samples = race({"bare": partial(model, x), "hooks": hand, "ours": ours}, ROUNDS)
    hooks_added, ours_added = samples.added("hooks", "bare"), samples.added("ours", "bare")
    bound = FACTOR * hooks_added.median + SLACK
    return {
        "case": case,
        "stack": kind,
        "rounds": ROUNDS,
        "bare_us": round(samples.median("bare"), 2),
        "hooks_added_us": as_dict(hooks_added),
        "ours_added_us": as_dict(ours_added),
        "ours_minus_hooks_us": as_dict(samples.added("ours", "hooks")),
        "ours_minus_hooks_cpu_us": as_dict(samples.added_cpu("ours", "hooks")),
        "bound_us": round(bound, 2),
        "within_bound": ours_added.median <= bound,
    }


def main() -> None:
    torch.set_num_threads(1)
    before = machine()
    with torch.no_grad():
        cases = [measure(case, kind) for kind in STACKS for case in BY_HAND]
    print(json.dumps({"torch": torch.__version__, "before": before, "after": machine(), "cases": cases}, indent=2))


if __name__ == "__main__":
    main()
