"""Activation patching on indirect-object identification: which layer and position carry the answer.

python examples/activation_patching.py [MODEL]
"""

import sys

from nnsight_compiler import LanguageModel, intervene


@intervene
def logit_difference(model, prompt, answer, other):
    with model.trace(prompt):
        logits = model.lm_head.output[0, -1]
    return logits[answer] - logits[other]


@intervene
def patched_difference(model, clean, corrupt, layer, position, answer, other):
    with model.trace(clean):
        source = model.layers[layer].input[:, position]
    with model.trace(corrupt):
        model.layers[layer].input[:, position] = source
        logits = model.lm_head.output[0, -1]
    return logits[answer] - logits[other]


if __name__ == "__main__":
    model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    clean = "When Mary and John went to the store, John gave a drink to"
    corrupt = "When Mary and John went to the store, Mary gave a drink to"
    answer, other = (model.tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in (" Mary", " John"))

    best, worst = (logit_difference(model, prompt, answer, other) for prompt in (clean, corrupt))
    words = [model.tokenizer.decode(token).strip() for token in model.tokenizer(corrupt)["input_ids"]]
    print("       ", "".join(f"{word:>6}" for word in words))
    for layer in range(len(model.layers)):
        row = [
            patched_difference(model, clean, corrupt, layer, position, answer, other) for position in range(len(words))
        ]
        print(f"layer {layer:2}", "".join(f"{float((value - worst) / (best - worst)):6.2f}" for value in row))
