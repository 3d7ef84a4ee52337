"""What a cached call costs of our own time: experiments on a model whose modules return at once.

Prints one JSON document; `run.py` runs it.
"""

from __future__ import annotations

import json
from functools import partial

import torch
from interleaved import as_dict, machine, race
from torch import Tensor, nn

from nnsight_compiler import NNsight, intervene

ROUNDS = 500
BOUND = 1000.0
"""Microseconds."""
LAYERS, POSITIONS = 12, 15


class Block(nn.Module):
    """The modules of a transformer block, none of which does anything."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


class Stub(nn.Module):
    """The module tree of a language model, and a forward that returns at once what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@intervene
def patch(model, clean, corrupt, layer, position):
    with model.trace(clean):
        source = model.layers[layer].output[:, position]
    with model.trace(corrupt):
        model.layers[layer].output[:, position] = source
        logits = model.head.output
    return logits[0, -1]


@intervene
def save_everything(model, clean):
    values = []
    with model.trace(clean):
        for layer in model.layers:
            values.append(layer.attn.output)
            values.append(layer.mlp.output)
            values.append(layer.output)
    return values


@intervene
def lens(model, clean):
    with model.trace(clean):
        logits = [model.head(model.norm(layer.output))[0, -1] for layer in model.layers]
    return logits


@intervene
def sweep(model, clean, corrupt):
    with model.trace(clean):
        streams = [layer.output for layer in model.layers]
    effects = []
    for layer in range(len(model.layers)):
        for position in range(clean.shape[1]):
            with model.trace(corrupt):
                model.layers[layer].output[:, position] = streams[layer][:, position]
                logits = model.head.output
            effects.append(logits[0, -1])
    return effects


def main() -> None:
    torch.set_num_threads(1)
    model, clean, corrupt = Stub(), torch.zeros(1, POSITIONS, 8), torch.ones(1, POSITIONS, 8)
    wrapped = NNsight(model)
    # What is asked of the model, and how many forwards that is.
    cases = {
        "patch one cell": (partial(patch, wrapped, clean, corrupt, 3, -1), 2),
        "save 36 sites": (partial(save_everything, wrapped, clean), 1),
        "logit lens": (partial(lens, wrapped, clean), 1),
        f"sweep {LAYERS} × {POSITIONS}": (partial(sweep, wrapped, clean, corrupt), 1 + LAYERS * POSITIONS),
    }
    before = machine()
    rows = []
    with torch.no_grad():
        for case, (call, forwards) in cases.items():
            call()
            samples = race({"bare": partial(model, clean), "ours": call}, ROUNDS // min(forwards, 25))
            own = samples.added("ours", "bare")
            rows.append(
                {
                    "case": case,
                    "forwards": forwards,
                    "bare_us": round(samples.median("bare"), 2),
                    "beyond_one_forward_us": as_dict(own),
                    "beyond_one_forward_cpu_us": as_dict(samples.added_cpu("ours", "bare")),
                    "within_bound": own.median <= BOUND if forwards <= 2 else None,
                }
            )
    print(json.dumps({"bound_us": BOUND, "before": before, "after": machine(), "cases": rows}, indent=2))


if __name__ == "__main__":
    main()
