"""A session: several traces as one program. Values flow from one to the next, and only what is saved comes back.

python examples/session.py [MODEL]
"""

import sys

from nnsight_compiler import LanguageModel

model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "tiny")
clean, corrupt = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"

with model.session():
    with model.trace(clean):
        sources = [layer.input[:, 1:3] for layer in model.layers]
        wanted = model.lm_head.output[0, -1].argmax()

    chances = list().save()
    for layer, source in enumerate(sources):
        with model.trace(corrupt):
            model.layers[layer].input[:, 1:3] = source
            probabilities = model.lm_head.output[0, -1].softmax(-1)
        chances.append(probabilities[wanted])

for layer, chance in enumerate(chances):
    print(f"layer {layer} patched at the subject: {chance:.3f}")
