"""Attribution patching: how much each layer and position matters, estimated by one backward pass for all, beside what
patching them one by one gives.

python examples/gradients.py [MODEL]
"""

import sys

from nnsight_compiler import LanguageModel, intervene


@intervene
def attribute(model, clean, corrupt, answer, other):
    """The first-order effect on the logit difference of giving each corrupt value its clean content."""
    with model.trace(clean):
        clean_streams = [layer.input for layer in model.layers]
    with model.trace(corrupt):
        streams = [layer.input for layer in model.layers]
        logits = model.lm_head.output[0, -1]
        difference = logits[answer] - logits[other]
        with difference.backward():
            scores = [((c - h) * h.grad).sum(-1)[0] for c, h in zip(clean_streams, streams, strict=True)]
    return scores


@intervene
def patch(model, clean, corrupt, layer, position, answer, other):
    """The effect itself, for one layer and position."""
    with model.trace(clean):
        source = model.layers[layer].input[:, position]
    with model.trace(corrupt):
        model.layers[layer].input[:, position] = source
        logits = model.lm_head.output[0, -1]
    return logits[answer] - logits[other]


if __name__ == "__main__":
    model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    clean, corrupt = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"
    answer, other = (model.tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in (" Paris", " Seattle"))
    with model.trace(corrupt):
        logits = model.lm_head.output[0, -1].save()
    start = logits[answer] - logits[other]

    tokens = model.tokenizer.tokenize(clean)
    print("layer   " + "".join(f"{token.strip('Ġ'):>9}" for token in tokens))
    scores = attribute(model, clean, corrupt, answer, other)
    for layer, score in enumerate(scores):
        print(f"guess {layer:2}" + "".join(f"{value:9.2f}" for value in score.tolist()))
        effects = [patch(model, clean, corrupt, layer, i, answer, other) - start for i in range(len(tokens))]
        print(f"true  {layer:2}" + "".join(f"{value:9.2f}" for value in effects))
