"""A sparse autoencoder of one's own: attached, trained on a layer's output, and read from inside.

python examples/own_modules.py [MODEL]
"""

import sys

import torch
from torch import nn

from nnsight_compiler import LanguageModel, intervene


class Autoencoder(nn.Module):
    def __init__(self, width, codes):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, codes), nn.Linear(codes, width)

    def forward(self, hidden):
        return self.decoder(torch.relu(self.encoder(hidden)))


@intervene
def losses(model, prompt, layer, sparsity):
    with model.trace(prompt):
        hidden = model.layers[layer].output.detach()
        error = model.layers[layer].sae(hidden, hook=True) - hidden
        codes = model.layers[layer].sae.encoder.output.relu()
        loss = error.pow(2).mean() + sparsity * codes.mean()
        used = (codes > 0).float().mean()
    return loss, used


if __name__ == "__main__":
    torch.manual_seed(0)
    model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    prompt, layer = "The Eiffel Tower is in the city of", 1

    width = model.layers[layer].mlp.c_proj.weight.shape[-1]
    model.layers[layer].sae = Autoencoder(width, 4 * width)
    optimiser = torch.optim.Adam(model.layers[layer].sae._module.parameters(), lr=3e-3)

    for step in range(41):
        loss, used = losses(model, prompt, layer, 0.01)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0:
            print(f"step {step:2}: loss {loss.item():.4f}, codes in use {used.item():.2f}")
