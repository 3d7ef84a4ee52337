"""Generation: steer every step towards another city, and watch what the model would say at each.

python examples/generation.py [MODEL]
"""

import sys

import torch

from nnsight_compiler import LanguageModel, intervene


@intervene
def steering_vector(model, towards, away, layer):
    with model.trace(towards):
        there = model.layers[layer].output[:, -1]
    with model.trace(away):
        here = model.layers[layer].output[:, -1]
    return there - here


@intervene
def continuation(model, prompt, layer, vector, strength, tokens):
    with model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False) as tracer:
        model.layers[layer].output[:, -1] += strength * vector  # at every step
        chances = []
        for _ in tracer.iter[:]:
            chances.append(model.lm_head.output[0, -1].softmax(-1).max())
        chances = torch.stack(chances)
        ids = tracer.result
    return ids[0, -tokens:], chances


if __name__ == "__main__":
    model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    prompt = "The Space Needle is in the city of"
    vector = steering_vector(model, "The Eiffel Tower is in the city of", prompt, layer=2)

    for strength in (0.0, 1.0):
        ids, chances = continuation(model, prompt, 2, vector, strength, tokens=3)
        words = ", ".join(
            f"{model.tokenizer.decode([token])!r} {chance:.2f}" for token, chance in zip(ids, chances, strict=True)
        )
        print(f"strength {strength:.1f}: {words}")

    print(continuation.explain(model, prompt, 2, vector, 1.0, 3))
