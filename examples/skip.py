"""Which layers does the answer need? Each is skipped in turn; then the forward is stopped early.

python examples/skip.py [MODEL]
"""

import sys

from nnsight_compiler import LanguageModel, intervene


@intervene
def without(model, prompt, layers):
    """The logits of the next token where some layers hand on their input."""
    with model.trace(prompt):
        for layer in layers:
            model.layers[layer].skip(model.layers[layer].input)
        logits = model.lm_head.output[0, -1]
    return logits


@intervene
def up_to(model, prompt, layer):
    """The residual stream after a layer; those after it are not run."""
    with model.trace(prompt) as tracer:
        hidden = model.layers[layer].output[0, -1]
        tracer.stop()
    return hidden


if __name__ == "__main__":
    model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    prompt = "The Eiffel Tower is in the city of"

    whole = without(model, prompt, ()).softmax(-1)
    answer = int(whole.argmax())
    print(f"{model.tokenizer.decode([answer])!r}: {whole[answer]:.3f}")
    for layer in range(len(model.layers)):
        chances = without(model, prompt, (layer,)).softmax(-1)
        print(f"without layer {layer}: {chances[answer]:.3f}")

    for layer in range(len(model.layers)):
        print(f"norm after layer {layer}: {up_to(model, prompt, layer).norm():.1f}")
