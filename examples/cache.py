"""A cache of activations: how far the residual stream is from what it finally becomes, layer by layer.

python examples/cache.py [MODEL]
"""

import sys

import torch

from nnsight_compiler import LanguageModel, intervene


@intervene
def residual_stream(model, prompt):
    with model.trace(prompt) as tracer:
        cache = tracer.cache(modules=["layers.*", "ln_final"], include_inputs=True)
    return cache


if __name__ == "__main__":
    model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    cache = residual_stream(model, "The Eiffel Tower is in the city of")
    final = cache.ln_final.input[0, -1]

    for number, layer in enumerate(cache.layers):
        cosine = torch.cosine_similarity(layer.output[0, -1], final, dim=0)
        print(f"layer {number}: cosine to the last layer's output {cosine:.3f}")

    print(cache)
