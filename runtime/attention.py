"""Where the values of attention stand in the forwards of models: q, k, v, scores, pattern, z.

Most models of transformers hand queries, keys and values to an attention function, and torch's own kernel, which most
of these use, gives no pattern. Where the pattern or the scores are asked for, the kernel is replaced in that layer, for
the run, by the computation that it stands for, from the same queries, keys and values and the same arguments: the mask
that it was given, or, where it was told `is_causal`, the causal one. Whatever the function around the kernel does (a
mask of its own, position biases, repeated keys) it goes on doing. A model's own attention function in Python is not
replaced: the pattern is what it multiplies the values with.

Models without an attention function are listed in `_OWN`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from nnsight_compiler.runtime.replacing import forward_of
from nnsight_compiler.runtime.rewriting import rewritten
from nnsight_compiler.runtime.source_operations import NoSourceError, listing

Hook = Callable[[Any], Any]
"""Takes a value and gives the one with which the model goes on."""

_KERNEL = torch.nn.functional.scaled_dot_product_attention


class AttentionError(Exception):
    """A value of attention that cannot be served."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(reason)
        self.reason, self.way_out = reason, way_out


@final
@dataclass(frozen=True, slots=True)
class Spot:
    """Where a value of attention stands at an operation.

    name: of the value. operation: of the forward.
    place: `argument`, with its number and keyword in `number` and `keyword`; `result`; or `item`, number `number` of
        the result.
    layout: the order of the dimensions there: rows, tokens, heads, width of a head; rows, heads, queries, keys of
        pattern and scores. `(rh)` are rows and heads in one dimension.
    """

    name: str
    operation: str
    place: str
    layout: str
    number: int = 0
    keyword: str = ""

    def result(self, module: nn.Module | None, hook: Hook, result: Any) -> Any:
        """The result of the operation after a hook on the value in it."""
        if self.place == "argument":
            return result
        if self.place == "result":
            return self._changed(module, hook, result)
        items = list(result)
        items[self.number] = self._changed(module, hook, items[self.number])
        return items if isinstance(result, list) else tuple(items)

    def arguments(
        self, module: nn.Module | None, hook: Hook, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the operation after a hook on the value among them."""
        if self.place != "argument":
            return args, kwargs
        if self.number < len(args):
            changed = self._changed(module, hook, args[self.number])
            return (*args[: self.number], changed, *args[self.number + 1 :]), kwargs
        return args, {**kwargs, self.keyword: self._changed(module, hook, kwargs[self.keyword])}

    def _changed(self, module: nn.Module | None, hook: Hook, value: torch.Tensor) -> torch.Tensor:
        usual = _to_usual(value, self.layout, _heads(module) if self.layout.startswith("(") else 1)
        if self.name in ("q", "k", "v"):
            usual = (
                usual.clone()
            )  # keys and values may be the cache's own, queries a view of what all three are cut from
            return _from_usual(hook(usual), self.layout)
        changed = hook(usual)
        return value if changed is usual else _from_usual(changed, self.layout).contiguous()


def _usual(layout: str) -> str:
    return "rhqk" if layout.endswith("qk") else "rthd"


def _to_usual(value: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    letters = layout.replace("(", "").replace(")", "")
    if layout.startswith("("):
        value = value.reshape(-1, heads, *value.shape[1:])
    return value.permute([letters.index(letter) for letter in _usual(layout)])


def _from_usual(value: torch.Tensor, layout: str) -> torch.Tensor:
    letters = layout.replace("(", "").replace(")", "")
    value = value.permute([_usual(layout).index(letter) for letter in letters])
    return value.flatten(0, 1) if layout.startswith("(") else value


def _heads(module: nn.Module | None) -> int:
    assert module is not None
    return int(module.num_heads)  # type: ignore[arg-type]  # what the classes in `_OWN` call it


@final
@dataclass(frozen=True, slots=True)
class Form:
    """How a class of modules computes attention.

    spots: where the values stand in the forward.
    within: the operations of the forward that compute pattern and scores inside themselves.
    queries: the number of the argument of these that are the queries, `[rows, heads, tokens, width]`.
    softmax: the operation inside that is the softmax, where its name does not say so.
    """

    spots: tuple[Spot, ...]
    within: frozenset[str] = frozenset()
    queries: int = 0
    softmax: str = ""


def _function(
    operations: Iterable[str], first: int, keywords: tuple[str, str, str], z: Spot, keys: str = "rhtd"
) -> Form:
    """The form of a forward that hands queries, keys and values to a function."""
    operations = tuple(operations)
    spots = [
        Spot(name, operation, "argument", keys if name == "k" else "rhtd", first + number, keywords[number])
        for operation in operations
        for number, name in enumerate("qkv")
    ]
    results = [Spot("z", operation, z.place, z.layout, z.number) for operation in operations]
    return Form((*spots, *results), frozenset(operations), first)


_NAMES = ("query", "key", "value")
_ATTN = _function(["self__attn_0"], 0, _NAMES, Spot("z", "", "item", "rhtd"))

_OWN: Mapping[str, Form] = {
    "GPTJAttention": _ATTN,
    "GPTNeoSelfAttention": _ATTN,
    "CodeGenAttention": Form(_ATTN.spots, _ATTN.within, 0, softmax="call_0"),
    "OpenAIGPTAttention": _function(["self__attn_0"], 0, ("q", "k", "v"), Spot("z", "", "item", "rhtd"), keys="rhdt"),
    "BloomAttention": Form(
        (
            Spot("q", "alibi_baddbmm_0", "argument", "(rh)td", 9, "batch1"),
            Spot("k", "alibi_baddbmm_0", "argument", "(rh)dt", 9, "batch2"),
            Spot("scores", "F_softmax_0", "argument", "rhqk", 0, "input"),
            Spot("pattern", "self_attention_dropout_0", "result", "rhqk"),
            Spot("v", "torch_bmm_0", "argument", "(rh)td", 1, "mat2"),
            Spot("z", "torch_bmm_0", "result", "(rh)td"),
        )
    ),
    "MptAttention": Form(
        (
            Spot("q", "torch_matmul_0", "argument", "rhtd", 0, "input"),
            Spot("k", "torch_matmul_0", "argument", "rhdt", 1, "other"),
            Spot("scores", "nn_functional_softmax_0", "argument", "rhqk", 0, "input"),
            Spot("pattern", "nn_functional_dropout_0", "result", "rhqk"),
            Spot("v", "torch_matmul_1", "argument", "rhtd", 1, "other"),
            Spot("z", "torch_matmul_1", "result", "rhtd"),
        )
    ),
    "XGLMAttention": Form(
        (
            Spot("q", "torch_bmm_0", "argument", "(rh)td", 0, "input"),
            Spot("k", "torch_bmm_0", "argument", "(rh)dt", 1, "mat2"),
            Spot("scores", "nn_functional_softmax_1", "argument", "(rh)qk", 0, "input"),
            Spot("pattern", "nn_functional_dropout_0", "result", "(rh)qk"),
            Spot("v", "torch_bmm_1", "argument", "(rh)td", 1, "mat2"),
            Spot("z", "torch_bmm_1", "result", "(rh)td"),
        )
    ),
}
"""By the name of the class, in the versions of transformers whose forwards have these operations."""

_INTERFACE = re.compile(r"attention_interface_\d+")
_OF_TORCH = re.compile(r"(\w+_)?scaled_dot_product_attention_\d+")
_PRODUCT = re.compile(r"torch_(matmul|bmm)_\d+")
_SOFTMAX = re.compile(r"(\w+_)?softmax_\d+")


def form_of(module: nn.Module) -> Form | None:
    """How a module computes attention; `None` where it does not, or in a way that is not known."""
    own = _OWN.get(_class_name(module))
    try:
        found = listing(forward_of(module))
    except NoSourceError:
        return None
    if own is not None:
        return own if {spot.operation for spot in own.spots} | own.within <= set(found.names) else None
    calls = [name for name in found.names if name in found.calls]
    handed = [name for name in calls if _INTERFACE.fullmatch(name)]
    if handed:
        return _function(handed, 1, _NAMES, Spot("z", "", "item", "rthd"))
    kernels = [name for name in calls if _OF_TORCH.fullmatch(name)]
    if kernels:
        return _function(kernels, 0, _NAMES, Spot("z", "", "result", "rhtd"))
    return None


def _class_name(module: nn.Module) -> str:
    kind = type(module)
    return "OpenAIGPTAttention" if kind.__module__.endswith("openai.modeling_openai") else kind.__name__


# --- pattern and scores ---


def attending(
    function: Callable[..., Any], form: Form, hooks: Mapping[str, Hook], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], bool]:
    """A function that computes attention, with hooks on the pattern and the scores in it; and whether that replaces
    torch's kernel.

    Raises:
        AttentionError: they are not to be found in it.
    """
    queries = args[form.queries] if form.queries < len(args) else kwargs[_NAMES[0]]
    shape = tuple(queries.shape[1:3])
    if function is _KERNEL:
        return _Kernel(hooks, shape), True
    try:
        found = listing(function)
    except NoSourceError as error:
        raise AttentionError(f"the pattern is not to be seen: {error}", _LOAD) from None
    kernels = frozenset(name for name in found.names if _OF_TORCH.fullmatch(name) and name in found.calls)
    if kernels:
        kernel = _Kernel(hooks, shape)

        def replaced(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            return (kernel if function is _KERNEL else function)(*args, **kwargs)

        return rewritten(function, kernels, replaced), True
    products = [name for name in found.names if _PRODUCT.fullmatch(name)]
    softmaxes = [name for name in found.names if _SOFTMAX.fullmatch(name)] or [form.softmax]
    if len(products) < 2 or len(softmaxes) != 1:
        name = getattr(function, "__name__", type(function).__name__)
        raise AttentionError(f"`{name}` shows no pattern", _LOAD)
    wanted = {products[-1]: "pattern", softmaxes[0]: "scores"}

    def hooked(name: str, function: Callable[..., Any], /, first: Any, *args: Any, **kwargs: Any) -> Any:
        hook = hooks.get(wanted[name])
        return function(first if hook is None else hook(first), *args, **kwargs)

    return rewritten(function, frozenset(name for name in wanted if wanted[name] in hooks and name), hooked), False


_LOAD = 'load the model with `attn_implementation="sdpa"` or `"eager"`'


@final
class _Kernel:
    """What `torch.nn.functional.scaled_dot_product_attention` computes, with hooks on the scores and the pattern.

    shape: the numbers of heads and of queries, where the function around the kernel hands them on in another order.
    """

    def __init__(self, hooks: Mapping[str, Hook], shape: tuple[int, int]) -> None:
        self.hooks, self.shape = hooks, shape

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        exact = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
        scores = query.to(exact) @ key.to(exact).transpose(-2, -1)
        scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        elif attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        scores = self._seen("scores", scores)
        pattern = scores.softmax(-1)
        nothing = (scores == -math.inf).all(-1, keepdim=True)  # a query that sees no key attends to none
        pattern = pattern.masked_fill(nothing, 0.0).to(value.dtype)
        pattern = torch.nn.functional.dropout(pattern, dropout_p, training=dropout_p > 0)
        return self._seen("pattern", pattern) @ value

    def _seen(self, name: str, value: torch.Tensor) -> torch.Tensor:
        hook = self.hooks.get(name)
        if hook is None:
            return value
        usual = value.reshape(value.shape[0], *self.shape, value.shape[-1])
        changed: torch.Tensor = hook(usual)
        return changed.reshape(value.shape)
