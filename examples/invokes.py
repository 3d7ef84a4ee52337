"""Activation patching in one forward: each prompt is an invoke of it, and values flow between them.

python examples/invokes.py [MODEL]
"""

import sys

from nnsight_compiler import LanguageModel, intervene


@intervene
def patch_all(model, clean, corrupt):
    patched = []
    with model.trace() as tracer:
        with tracer.invoke(clean):
            sources = [layer.output[:, -1] for layer in model.layers]
        for layer, source in zip(model.layers, sources, strict=True):
            with tracer.invoke(corrupt):
                layer.output[:, -1] = source
                patched.append(model.lm_head.output[0, -1])
    return patched


if __name__ == "__main__":
    model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    clean, corrupt = "The Eiffel Tower is in the city of", "The Space Needle is in the beautiful city of"
    for layer, logits in enumerate(patch_all(model, clean, corrupt)):
        chances = logits.softmax(-1)
        best = chances.argmax()
        print(f"layer {layer:2}: {model.tokenizer.decode(best)!r} {float(chances[best]):.2f}")
