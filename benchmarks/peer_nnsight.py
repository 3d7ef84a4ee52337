"""The cases of `call_cost.py` in nnsight, in a process of its own, against the same hand hooks.

Run by an interpreter that has nnsight and torch; prints one JSON document.
"""

from __future__ import annotations

import json
from functools import partial
from importlib.metadata import version

import torch
from interleaved import as_dict, machine, race
from nnsight import NNsight, save
from stack import BY_HAND, ROUNDS, Stack, check_equal, make_stack
from torch import Tensor


def save_one(model: NNsight, x: Tensor) -> Tensor:
    with model.trace(x):
        hidden = model.layers[3].output.save()
    return hidden


def save_all(model: NNsight, x: Tensor) -> list[Tensor]:
    with model.trace(x):
        hidden = save([layer.output for layer in model.layers])
    return hidden


def write_one(model: NNsight, x: Tensor) -> Tensor:
    with model.trace(x):
        model.layers[1].output[:] = 0
        result = model.output.save()
    return result


PEER = {"save one layer": save_one, "save all four layers": save_all, "write one layer": write_one}


def measure(case: str, model: Stack, x: Tensor) -> dict[str, object]:
    hand, peer = partial(BY_HAND[case], model, x), partial(PEER[case], NNsight(model), x)
    check_equal(case, hand(), peer())
    samples = race({"bare": partial(model, x), "hooks": hand, "nnsight": peer}, ROUNDS)
    return {
        "case": case,
        "rounds": ROUNDS,
        "bare_us": round(samples.median("bare"), 2),
        "hooks_added_us": as_dict(samples.added("hooks", "bare")),
        "nnsight_added_us": as_dict(samples.added("nnsight", "bare")),
    }


def main() -> None:
    torch.set_num_threads(1)
    before = machine()
    with torch.no_grad():
        cases = [measure(case, *make_stack()) for case in BY_HAND]
    versions = {"nnsight": version("nnsight"), "torch": torch.__version__}
    print(json.dumps({**versions, "before": before, "after": machine(), "cases": cases}, indent=2))


if __name__ == "__main__":
    main()
