"""Names of one's own, and shapes without a run."""

from nnsight import save

PROMPT = "The Eiffel Tower is in the city of"


def renamed_layers(renamed):
    with renamed.trace(PROMPT):
        hidden = renamed.blocks[1].output.save()
    return hidden


def a_renamed_submodule(renamed):
    with renamed.trace(PROMPT):
        renamed.blocks[1].ff.output[:] = 0
        logits = renamed.lm_head.output.save()
    return logits


def names_of_the_model_stay(renamed):
    with renamed.trace(PROMPT):
        hidden = renamed.transformer.h[1].output.save()
    return hidden


def the_shape_by_scan(model):
    with model.scan(PROMPT):
        shape = save(tuple(model.transformer.h[1].output.shape))
    return shape
