"""Positions by words: move the hidden states of one subject to another prompt, wherever its tokens are.

python examples/positions.py [MODEL]
"""

import sys

from nnsight_compiler import LanguageModel, intervene


@intervene
def move_subject(model, clean, clean_subject, corrupt, corrupt_subject, layer):
    with model.trace(clean) as tracer:
        subject = model.layers[layer].resid_pre[:, tracer.position(clean_subject).all]
    with model.trace(corrupt) as tracer:
        model.layers[layer].resid_pre[:, tracer.position(corrupt_subject).all] = subject
        logits = model.lm_head.output[0, -1]
    return logits


if __name__ == "__main__":
    model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    clean, corrupt = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"

    print(f"Eiffel Tower: tokens {tuple(model.position(clean, 'Eiffel Tower'))}")
    for layer in range(len(model.layers)):
        logits = move_subject(model, clean, "Eiffel Tower", corrupt, "Space Needle", layer)
        print(f"before layer {layer}: {model.tokenizer.decode([int(logits.argmax())])!r}")
