"""What a value of a program may be, as far as it matters to which calls a file may make, and what such calls are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from string import Formatter
from types import FunctionType, MethodType
from typing import Any, final

import torch
from torch import nn

from nnsight_compiler.files.classes import OF_FILES
from nnsight_compiler.files.vocabulary import DENIED_METHODS, KnownName, Named, name_of
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.passes.behaviour import Behaviour, words
from nnsight_compiler.passes.known_calls import known_method
from nnsight_compiler.passes.known_torch_python import by_hand

BARE_METHODS = frozenset({"save", "barrier", "stop"})
"""Methods that the language gives a meaning, without arguments. With arguments, it is another's (`tokenizer.save`)."""
TEXT_METHODS = frozenset(words("tokenizer batch_decode convert_tokens_to_ids convert_ids_to_tokens"))
"""Calls by which a model's tokenizer turns text to numbers and back."""
TRAINING_METHODS = frozenset(words("backward step zero_grad get_last_lr"))
"""Methods of losses, optimisers and their schedules. Given positional arguments, it is another's: `step(closure)`."""
TREE_METHODS = frozenset(
    words(
        "children modules named_children named_modules parameters named_parameters buffers named_buffers state_dict "
        "values items keys"
    )
)
"""Methods of torch's modules that look, and change nothing."""
PLAIN = frozenset(
    {name for name in dir(torch.Tensor) if not callable(getattr(torch.Tensor, name, None))}
    | {"logits", "loss", "hidden_states", "last_hidden_state", "attentions", "past_key_values", "weight", "bias"}
    | {"vocab_size", "n_layer", "n_head", "n_embd", "hidden_size", "num_hidden_layers", "num_attention_heads"}
)
"""Attributes that are values, not methods, wherever they are found."""
FORMATTING = frozenset({"format", "format_map"})
"""Methods of texts that look up attributes which the text names."""
KEEPING = frozenset(words("grad requires_grad data real imag logits loss hidden_states last_hidden_state attentions"))
"""Attributes of tensors, and of what models give, that may be set on a value of which nothing is known."""
HANDED_ON = frozenset(words("streamer stopping_criteria logits_processor prefix_allowed_tokens_fn"))
"""Arguments of a generation that bring a function which it calls."""
THROUGH = frozenset(
    words(
        "builtins.enumerate builtins.zip builtins.reversed builtins.tuple builtins.iter builtins.next "
        "tqdm.tqdm tqdm.auto.tqdm tqdm.std.tqdm tqdm.notebook.tqdm tqdm.asyncio.tqdm_asyncio itertools.chain"
    )
)
"""Known calls whose result holds what their arguments hold, and nothing else. A list may be given more later."""
PRINTING = frozenset(words("builtins.print pprint.pprint traceback.print_exc")) | {
    target for target in THROUGH if target.startswith("tqdm.")
}
"""Known calls that write to a stream which they may be given."""


@final
@dataclass(frozen=True, slots=True)
class HostOp:
    """A call, or another use, of something outside of the closed set: what it is, and its line."""

    name: str
    span: Span

    def __str__(self) -> str:
        return f"{self.span}: {self.name}"


@final
@dataclass(frozen=True, slots=True)
class Own:
    """A function of the file, or a closure of the program."""

    program: Program | None = None


@final
@dataclass(frozen=True, slots=True)
class Tree:
    """One of these captured modules, or of those inside them."""

    modules: tuple[nn.Module, ...]


@final
@dataclass(frozen=True, slots=True)
class Instances:
    """One of these captured objects of one plain class, of which there may be none."""

    kind: type
    held: tuple[object, ...]


@final
@dataclass(frozen=True, slots=True)
class Given:
    """What the caller gave, or a part of it."""


@final
@dataclass(frozen=True, slots=True)
class Computed:
    """A value that the program computed, or read from the model: a tensor, a number, a container; no module."""


@final
@dataclass(frozen=True, slots=True)
class Anything:
    """A value of which nothing is known."""


ANYTHING, GIVEN, COMPUTED = Anything(), Given(), Computed()


@final
@dataclass(frozen=True, slots=True)
class Part:
    """An attribute of something that only the run can give, or an item of that (`name` then ends in `[…]`)."""

    name: str
    root: Given | Computed | Anything = ANYTHING


Kind = Named | Own | Tree | Instances | Given | Part | Computed | Anything
Environment = Callable[[str, str], Kind]
"""What a name stands for, by name and scope."""


def kind_of(held: Any) -> Kind:
    """What a captured object is."""
    program = getattr(held, "__program__", None) if isinstance(held, (FunctionType, MethodType)) else None
    if isinstance(program, Program):
        return Own(program)
    if isinstance(held, nn.Module):
        return Tree((held,))
    if is_instance(held):
        return Instances(type(held), (held,))
    target = name_of(held)
    return ANYTHING if target is None else KnownName(target)


def is_instance(held: object) -> bool:
    """Whether something is an object of a plain class that a file has made."""
    return type(held).__module__ == OF_FILES and not isinstance(held, (nn.Module, type))


@cache
def barriers() -> frozenset[str]:
    """The last names of the calls that a file may make, and whose effects are not told to passes."""
    rows = (row.target.rpartition(".")[2] for row in by_hand() if row.behaviour is Behaviour.BARRIER)
    return TRAINING_METHODS.union(rows)


def trains(op: ops.Call, name: str) -> bool:
    """Whether the call of a method of this name is one of those that train."""
    return name in TRAINING_METHODS and all(each.keyword not in (None, "closure") for each in op.arguments)


def is_known_method(name: str) -> bool:
    return name not in DENIED_METHODS | FORMATTING and known_method(name) is not None


def looks_at_values(text: object) -> bool:
    """Whether a text for `format` takes its values as they are, or their items, and none of their attributes."""
    if not isinstance(text, str):
        return False
    try:
        parts = [(name, spec) for _, name, spec, _ in Formatter().parse(text) if name is not None]
    except ValueError:  # no text for `format`, as it will say itself
        return True
    return all("." not in name and (not spec or looks_at_values(spec)) for name, spec in parts)
