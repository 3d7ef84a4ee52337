"""A scan: the shapes and dtypes of an experiment, without loading the weights of its model.

python examples/scan.py [MODEL]
"""

import sys

from nnsight_compiler import LanguageModel

model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "tiny")

with model.scan("The Eiffel Tower is in the city of") as tracer:
    subject = tracer.position("Eiffel Tower")
    hidden = [layer.resid_post[:, subject].save() for layer in model.layers]
    model.layers[1].mlp.output = 0
    logits = model.lm_head.output.save()

print(f"tokens {tuple(subject)}")
for number, each in enumerate(hidden):
    print(f"layer {number}: {each.dtype} {list(each.shape)}")
print(f"logits: {logits.dtype} {list(logits.shape)}")
