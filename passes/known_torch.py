"""Torch's rows of the table of known calls, derived from the schemas of the aten operators.

A schema says which arguments an operator writes and which its result may share storage with, but only operators with a
kernel of their own can be trusted to say it all: one composed of others may hand its input back (`dropout` in
evaluation, `type_as` to the same type) without saying so. Those are taken to return a view of any argument, except
where they are listed in `FRESH`. What torch defines in Python has no schema and is listed by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional

from nnsight_compiler.passes.behaviour import EVERY, OUT, Behaviour, KnownCall, Option, Place, Takes, words
from nnsight_compiler.passes.known_torch_python import by_hand

FRESH = frozenset(
    words("""
    absolute adaptive_avg_pool1d adaptive_max_pool1d arccos arccosh arcsin arcsinh arctan arctan2 arctanh argwhere
    avg_pool1d batch_norm bilinear binary_cross_entropy_with_logits block_diag cdist column_stack concat concatenate
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d corrcoef cosine_embedding_loss
    cosine_similarity cov cross cross_entropy_loss ctc_loss cumulative_trapezoid diag_embed diagflat divide
    embedding_bag empty fix fliplr flipud float_power ger greater greater_equal group_norm hinge_embedding_loss hstack
    dstack inner inverse isclose isfinite isreal kl_div kron l1_loss layer_norm less less_equal linalg_cond linalg_det
    linalg_eigvals linalg_eigvalsh linalg_inv linalg_matmul linalg_matrix_norm linalg_matrix_rank linalg_norm
    linalg_pinv linalg_slogdet linalg_solve linalg_svd linalg_svdvals linalg_vander linalg_vecdot linear log_softmax
    logdet margin_ranking_loss matmul max_pool1d max_pool1d_with_indices max_pool2d max_pool3d multiply
    nanmean nanmedian nanquantile negative nll_loss nll_loss_nd not_equal nuclear_norm outer pairwise_distance pdist
    pinverse poisson_nll_loss quantile rms_norm row_stack selu silu slogdet smm softmax special_digamma special_exp2
    special_expit special_expm1 special_gammaln special_log1p special_log_softmax special_logit special_logsumexp
    special_softmax square std std_mean subtract svd take_along_dim tensordot trapezoid trapz triplet_margin_loss
    true_divide vander var var_mean vstack where one_hot scaled_dot_product_attention
    fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_fftn fft_ifftn fft_rfft2 fft_irfft2 fft_rfftn fft_irfftn
    fft_fftfreq fft_rfftfreq fft_fftshift fft_ifftshift
    """)
)
"""Composed operators whose result is always new."""

_UNKNOWN = frozenset(
    words("""
    set_ swap_ resize_ resize_as_ data is_leaf output_nr requires_grad retains_grad names apply_ map_ map2_
    register_hook backward module_load storage untyped_storage _version rename_ rename resize resize_as
    resize_as_sparse resize_as_sparse_ qscheme
    """)
)
"""Operators that run code of the user's, or rearrange storage itself: left to be host calls."""

_NO_FUNCTIONS = frozenset(words("compile cond while_loop vmap fork wait from_file"))
"""Of these names, functions of `torch` run code of the user's or read files; elsewhere they are other things."""

_DEVICES = (
    *("cudnn_", "miopen_", "mkldnn_", "fbgemm_", "quantized_", "q_", "quantize_"),
    *("native_batch_norm", "batch_norm_"),
)
"""Kernels of one device or layout, below what users call, whose schemas do not tell what they write."""

_SCALAR = frozenset({"int", "float", "bool", "Scalar", "str", "Device", "ScalarType", "Layout", "QScheme", "SymInt"})

_ARRAY_OUT = {"all": 2, "any": 2, "argmax": 2, "argmin": 2, "max": 2, "min": 2, "std": 3, "var": 3}
"""Methods of tensors whose argument at this place is the `out` of an array's method of the same name."""

_FIRST = ("input", "x", "a", "x1")
"""What Python calls the argument that schemas call `self`."""

_SPACES: dict[str, str] = {
    "torch.Tensor.": "",
    "torch.nn.functional.": "",
    "torch.special.": "special_",
    "torch.linalg.": "linalg_",
    "torch.fft.": "fft_",
    "torch.": "",
}
"""Where torch's calls live, and what aten puts before their names. The longest prefix of a name counts."""


@cache
def _by_hand() -> dict[str, KnownCall]:
    rows = (row if row.behaviour is Behaviour.HARMLESS else _writing_out(row) for row in by_hand())
    return {row.target: row for row in rows}


def _writing_out(row: KnownCall) -> KnownCall:
    options = [*row.options, OUT]
    space, _, name = row.target.rpartition(".")
    if space == "torch.Tensor":
        # An array, or a table of another library, may be the receiver of what looks like a tensor's method.
        options.append(Option(("inplace",), (0,)))
        if name in _ARRAY_OUT:
            options.append(Option((_ARRAY_OUT[name],), (_ARRAY_OUT[name],)))
    return replace(row, options=tuple(options))


def torch_row(target: str) -> KnownCall | None:
    """The row of a name such as `torch.Tensor.softmax`; `None` where nothing is known of it."""
    if target in _by_hand():
        return _by_hand()[target]
    for space, prefix in _SPACES.items():
        if target.startswith(space):
            name = target[len(space) :]
            if not name.isidentifier() or name.startswith(("__", *_DEVICES)) or name in _UNKNOWN:
                return None
            if (space == "torch." and name in _NO_FUNCTIONS) or torch_object(target) is None:
                return None
            derived = _derived(target, prefix + name)
            return None if derived is None else _writing_out(derived)
    return None


@cache
def _derived(target: str, name: str) -> KnownCall | None:
    """What the schemas of all overloads of `aten::name` say, put together.

    Those for tensors with named dimensions are left aside: older versions of torch compose them of others.
    """
    schemas = [
        schema
        for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}")
        if torch._C._dispatch_has_kernel(_full_name(schema)) and "Dimname" not in schema.overload_name
    ]
    schemas = [schema for schema in schemas if not _writes_out(schema)]
    if not schemas:
        return None
    takes = _takes(schemas) if target.startswith("torch.Tensor.") else None
    mutates: set[Place] = set()
    aliases: set[Place] = set()
    for schema in schemas:
        returned = {name for result in schema.returns if result.alias_info for name in result.alias_info.before_set}
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is None:
                continue
            places = {position, argument.name, *(_FIRST if position == 0 else ())}
            if argument.alias_info.is_write:
                mutates |= places
            # An argument that is marked and not written is there for a view, be it inside a returned list.
            if not argument.alias_info.is_write or argument.alias_info.before_set & returned:
                aliases |= places
    kinds = {str(result.type) for schema in schemas for result in schema.returns}
    scalar = bool(kinds) and kinds <= _SCALAR
    if not aliases and not scalar and name not in FRESH and any(map(_is_composed, schemas)):
        aliases = set(EVERY)
    return KnownCall(
        target,
        Behaviour.MUTATES if mutates else Behaviour.VIEW if aliases else Behaviour.PURE,
        tuple(sorted(mutates, key=str)),
        tuple(sorted(aliases, key=str)),
        random=any(map(_draws, schemas)),
        scalar=scalar,
        leaf=all(
            len(schema.returns) == 1 and str(schema.returns[0].type) in ("Tensor", *_SCALAR) for schema in schemas
        ),
        takes=takes,
    )


def _takes(schemas: list[Any]) -> Takes:
    """How many arguments the overloads take. A list of numbers that stands alone may be spelled out: `view(2, 3)`."""
    least, most, total = math.inf, 0.0, 0.0
    for schema in schemas:
        plain = [argument for argument in schema.arguments if not argument.kwarg_only]
        spelled = len(plain) == 2 and str(plain[1].type).startswith("List[")
        least = min(least, sum(not argument.has_default_value() for argument in plain) - spelled)
        most = max(most, math.inf if spelled else len(plain))
        total = max(total, math.inf if spelled else len(schema.arguments))
    return Takes(int(min(least, most)), most, total)


def _full_name(schema: Any) -> str:
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else str(schema.name)


def _writes_out(schema: Any) -> bool:
    return any(
        argument.kwarg_only and argument.alias_info and argument.alias_info.is_write for argument in schema.arguments
    )


def _is_composed(schema: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(_full_name(schema), "CompositeImplicitAutograd"))


def _draws(schema: Any) -> bool:
    found = torch._C._get_operation_overload(schema.name, schema.overload_name)
    return found is not None and torch.Tag.nondeterministic_seeded in found[2]


def torch_object(target: str) -> object | None:
    """The callable behind a name such as `torch.nn.functional.relu`, or `None`."""
    found: object = torch
    for part in target.split(".")[1:]:
        found = getattr(found, part, None)
    return found if callable(found) else None


def torch_targets() -> Iterator[str]:
    """The names of all torch's rows, derived ones included."""
    seen = set(_by_hand())
    yield from seen
    for space in _SPACES:
        for name in _members(space):
            target = space + name
            if target not in seen and torch_row(target) is not None:
                seen.add(target)
                yield target


def _members(space: str) -> list[str]:
    holder: Any = torch
    for part in space.split(".")[1:-1]:
        holder = getattr(holder, part)
    spaces = (holder,) if isinstance(holder, ModuleType) else (torch.Tensor, torch._C.TensorBase)
    return sorted({name for each in spaces for name in vars(each) if not name.startswith("_")})


def torch_callables() -> Iterator[tuple[object, str]]:
    """Every callable of torch's that may have a row, with its name; cheap, since no row is derived here."""
    for target in _by_hand():
        found = torch_object(target)
        if found is not None:
            yield found, target
            if hasattr(found, "__wrapped__"):  # torch's compiler may have wrapped what users imported before
                yield found.__wrapped__, target
    for space in _SPACES:
        holder: Any = torch
        for part in space.split(".")[1:-1]:
            holder = getattr(holder, part)
        for name in _members(space):
            found = getattr(holder, name, None)
            if callable(found) and not isinstance(found, (type, ModuleType)):
                yield found, space + name
