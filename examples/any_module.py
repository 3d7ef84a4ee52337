"""Experiments on any torch module: names come from the module itself.

python examples/any_module.py
"""

import torch
from torch import nn

from nnsight_compiler import NNsight, intervene

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
model = NNsight(network)


@intervene
def ablate(model, x, unit):
    with model.trace(x):
        model[1].output[:, unit] = 0
        result = model.output
    return result


x = torch.randn(1, 4)
untouched = network(x).detach()
for unit in range(8):
    change = (ablate(model, x, unit) - untouched).norm()
    print(f"unit {unit}: the output moves by {float(change):.4f}")
