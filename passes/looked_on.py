"""Generations that something looks on as they come: a function of the user's, or another's, is given their tokens."""

from __future__ import annotations

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.values import NONE

PLAIN_ARGUMENTS = frozenset(
    {
        "input_ids", "inputs", "inputs_embeds", "attention_mask", "max_new_tokens", "min_new_tokens", "max_length",
        "min_length", "do_sample", "eos_token_id", "pad_token_id", "use_cache",
    }
)  # fmt: skip
"""Arguments of `generate` that call nothing, and mean the same for each of several rows."""


LOOKING_ARGUMENTS = frozenset({"on_token", "streamer", "stopping_criteria", "logits_processor"})
"""Arguments of `generate` that are given its tokens."""


def is_looked_on(forward: ops.Forward) -> bool:
    """Whether something is given the tokens of a generation for certain."""
    given = forward.arguments if forward.method == "generate" else ()
    return any(each.keyword in LOOKING_ARGUMENTS and each.value != NONE for each in given)


def looked_on(forward: ops.Forward) -> ops.Argument | None:
    """The argument by which a generation may be looked on: any that is not known for another. `None` where there is
    none, and for a single run of the model."""
    for argument in forward.arguments if forward.method == "generate" else ():
        plain = argument.keyword is None or argument.keyword in PLAIN_ARGUMENTS or argument.value == NONE
        if argument.star or not plain:
            return argument
    return None
