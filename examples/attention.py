"""Attention by name: which tokens a fact comes from, and what is lost without a head or without one edge.

python examples/attention.py
"""

from nnsight_compiler import LanguageModel, intervene

model = LanguageModel("tiny")
prompt = "The Eiffel Tower is in the city of"


@intervene
def patterns(model, prompt):
    found = []
    with model.trace(prompt):
        for layer in model.layers:
            found.append(layer.attn.pattern[0, :, -1])
    return found


@intervene
def without_head(model, prompt, layer, head):
    with model.trace(prompt):
        model.layers[layer].attn.z[:, :, head] = 0
        logits = model.lm_head.output[0, -1]
    return logits


@intervene
def without_edge(model, prompt, layer, query, key):
    """All heads of a layer with one query cut off from one key; what is left of each row adds up to 1 again."""
    with model.trace(prompt):
        pattern = model.layers[layer].attn.pattern
        pattern[:, :, query, key] = 0
        pattern /= pattern.sum(-1, keepdim=True)
        logits = model.lm_head.output[0, -1]
    return logits


tokens = model.tokenizer.tokenize(prompt)
with model.trace(prompt):
    plain = model.lm_head.output[0, -1].save()
paris = int(plain.argmax())
print(f"{model.tokenizer.decode([paris])!r}: logit {float(plain[paris]):.2f}")

for layer, pattern in enumerate(patterns(model, prompt)):
    strongest = pattern.mean(0).argmax()
    print(f"layer {layer}: the last token looks most at {tokens[strongest]!r}")

for layer in range(len(model.layers)):
    lost = [plain[paris] - without_head(model, prompt, layer=layer, head=head)[paris] for head in range(4)]
    print(f"layer {layer} without a head: {'  '.join(f'{float(each):+.2f}' for each in lost)}")

for layer in range(len(model.layers)):
    lost = plain[paris] - without_edge(model, prompt, layer=layer, query=-1, key=2)[paris]
    print(f"layer {layer} without the edge from {tokens[2]!r} to the last token: {float(lost):+.2f}")

print(without_edge.explain(model, prompt, layer=1, query=-1, key=2))
