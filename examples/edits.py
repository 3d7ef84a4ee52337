"""Edits: a steered model as a view of its own, kept in a file, and put onto another copy of the model.

python examples/edits.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

from nnsight_compiler import LanguageModel, intervene


@intervene
def direction(model, towards, away, layer):
    with model.trace(towards):
        there = model.layers[layer].input[0, 1:3]
    with model.trace(away):
        here = model.layers[layer].input[0, 1:3]
    return there - here


@intervene
def chance(model, prompt, answer):
    with model.trace(prompt):
        logits = model.lm_head.output[0, -1]
    return logits.softmax(-1)[answer]


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    model = LanguageModel(name)
    prompt = "The Space Needle is in the city of"
    vector = direction(model, "The Eiffel Tower is in the city of", prompt, layer=0)
    paris = model.tokenizer(" Paris", add_special_tokens=False)["input_ids"][0]

    with model.edit() as steered:
        steered.layers[0].input[:, 1:3] += vector

    print(f"P(' Paris') as it is {chance(model, prompt, paris):.3f}, steered {chance(steered, prompt, paris):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "steered.safetensors")
        print(steered.export_edits(path))
        again = LanguageModel(name).import_edits(path)
        print(f"P(' Paris') of another copy with the edit from the file {chance(again, prompt, paris):.3f}")
