"""Operations inside of a module: what a block computes between its submodules, read and changed by name.

python examples/source.py
"""

from nnsight_compiler import LanguageModel, intervene

model = LanguageModel("tiny")
prompt = "The Eiffel Tower is in the city of"

print(model.layers[0].source)  # the block's forward, with the names of its operations beside the lines


@intervene
def without(model, prompt, layer):
    """The logits where a block hands its MLP nothing of what attention found in this layer."""
    with model.trace(prompt):
        block = model.layers[layer].source
        stream = block.residual_0.output  # what enters the block
        block.self_ln_2_0.input = stream
        logits = model.lm_head.output[0, -1]
    return logits


with model.trace(prompt):
    plain = model.lm_head.output[0, -1].save()

paris = int(plain.argmax())
print(f"{model.tokenizer.decode([paris])!r}: logit {float(plain[paris]):.2f}")
for layer in range(len(model.layers)):
    changed = without(model, prompt, layer=layer)
    print(f"layer {layer}: an MLP that does not see its attention gives {float(changed[paris]):.2f}")
