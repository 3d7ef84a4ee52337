"""The same experiment on a model that is elsewhere: one job, many at once, and code of one's own that stays here.

python examples/remote.py [URL]     without a URL, this process is sent the jobs, as a service would be

A service on this machine: nnsightc serve tiny
"""

import sys
from collections import Counter

from nnsight_compiler import LanguageModel, intervene


@intervene
def patch(model, clean, corrupt, layer, position):
    with model.trace(clean):
        source = model.layers[layer].output[:, position]
    with model.trace(corrupt):
        model.layers[layer].output[:, position] = source
        logits = model.lm_head.output[0, -1]
    return logits.softmax(-1)


@intervene
def favourites(model, prompts):
    seen = Counter()  # a class that no service knows: it stays here, and so does all that is done with it
    for prompt in prompts:
        with model.trace(prompt):
            token = model.lm_head.output[0, -1].argmax()
        seen.update([model.tokenizer.decode(token)])
    return seen


if __name__ == "__main__":
    clean, corrupt = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"
    where = sys.argv[1] if len(sys.argv) > 1 else "local"
    elsewhere = where != "local"
    model = LanguageModel("tiny", remote=where) if elsewhere else LanguageModel("tiny")

    print(patch.explain(model, clean, corrupt, 2, -1, remote=where).crossings[0])
    if elsewhere:  # all are sent before the first is waited for
        handles = [patch(model, clean, corrupt, k, -1, remote=where, blocking=False) for k in range(3)]
        found = [handle.result() for handle in handles]
    else:
        found = [patch(model, clean, corrupt, k, -1, remote=where) for k in range(3)]
    for layer, chances in enumerate(found):
        print(f"layer {layer}: {model.tokenizer.decode(chances.argmax())!r} {chances.max():.2f}")

    for word, times in favourites(model, [clean, corrupt], remote=where).items():
        print(f"{word!r} {times}")
