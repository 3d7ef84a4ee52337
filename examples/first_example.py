"""The first example: save and change internals in an undecorated trace, then compile an experiment once.

python examples/first_example.py            the small model inside the package
python examples/first_example.py MODEL      a folder, a .gguf file, or a name on the hub
"""

import sys

from nnsight_compiler import LanguageModel, intervene

model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "tiny")

with model.trace("The Eiffel Tower is in the city of"):
    hidden_state = model.layers[1].input[0].save()
    model.layers[2].mlp.output = 0
    output = model.output.save()

print("hidden state:", tuple(hidden_state.shape))
print("without the last MLP:", repr(model.tokenizer.decode(output.logits[0, -1].argmax())))


@intervene
def patch(model, clean, corrupt, layer, position):
    with model.trace(clean):
        source = model.layers[layer].output[:, position]
    with model.trace(corrupt):
        model.layers[layer].output[:, position] = source
        logits = model.lm_head.output[:, -1]
    return logits.softmax(-1)


clean, corrupt = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"
for layer in range(len(model.layers)):
    for position in (2, -1):
        probabilities = patch(model, clean, corrupt, layer=layer, position=position)[0]
        top = int(probabilities.argmax())
        print(f"layer {layer}, position {position:2}: {model.tokenizer.decode(top)!r} {probabilities[top]:.3f}")

print()
print(patch.ir)
print(patch.lower(model, clean, corrupt, layer=1, position=-1))
