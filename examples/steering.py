"""Steering: add the difference of two subjects to the residual stream at their tokens, at several strengths.

python examples/steering.py [MODEL]
"""

import sys

from nnsight_compiler import LanguageModel, intervene


@intervene
def steering_vector(model, towards, away, layer):
    with model.trace(towards):
        there = model.layers[layer].input[0, 1:3]
    with model.trace(away):
        here = model.layers[layer].input[0, 1:3]
    return there - here


@intervene
def steer(model, prompt, layer, vector, strength):
    with model.trace(prompt):
        model.layers[layer].input[:, 1:3] += strength * vector
        logits = model.lm_head.output[0, -1]
    return logits.softmax(-1)


if __name__ == "__main__":
    model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    prompt = "The Space Needle is in the city of"
    vector = steering_vector(model, "The Eiffel Tower is in the city of", prompt, layer=0)
    paris, seattle = (
        model.tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in (" Paris", " Seattle")
    )

    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        probabilities = steer(model, prompt, 0, vector, strength)
        chances = f"P(' Paris') {probabilities[paris]:.3f}  P(' Seattle') {probabilities[seattle]:.3f}"
        print(f"strength {strength:.2f}: {chances}")

    print(steer.cache_info())
