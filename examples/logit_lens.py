"""Logit lens: each layer's residual stream, read as if it were the last one's.

python examples/logit_lens.py [MODEL]
"""

import sys

import torch

from nnsight_compiler import LanguageModel, intervene


@intervene
def logit_lens(model, prompt):
    with model.trace(prompt):
        logits = [model.lm_head(model.ln_final(layer.output[0, -1])) for layer in model.layers]
    return torch.stack(logits).softmax(-1)


if __name__ == "__main__":
    model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    for layer, probabilities in enumerate(logit_lens(model, "The Eiffel Tower is in the city of")):
        values, tokens = probabilities.topk(3)
        words = (f"{model.tokenizer.decode(token)!r} {value:.3f}" for value, token in zip(values, tokens, strict=True))
        print(f"layer {layer:2}:", "  ".join(words))
