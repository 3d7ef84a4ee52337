"""Torch's rows of the table of known calls, derived from the schemas of the aten operators.

A schema says which arguments an operator writes and which its result may share storage with, but only operators with a
kernel of their own can be trusted to say it all: one composed of others may hand its input back (`dropout` in
evaluation, `type_as` to the same type) without saying so. Those are taken to return a view of any argument, except
where they are listed in `FRESH`. What torch defines in Python has no schema and is listed by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional

from nnsight_compiler.passes.behaviour import EVERY, Behaviour, KnownCall, Place, words

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
    logdet margin_ranking_loss matmul max_pool1d max_pool1d_with_indices max_pool2d max_pool3d moveaxis multiply
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
    set_ swap_ resize_ resize_as_ data is_leaf output_nr requires_grad retains_grad names compile cond while_loop vmap
    fork wait apply_ map_ map2_ register_hook backward module_load storage untyped_storage _version rename_ rename
    resize resize_as resize_as_sparse resize_as_sparse_ qscheme
    """)
)
"""Operators that run code of the user's, or rearrange storage itself: left to be host calls."""

_SCALAR = frozenset({"int", "float", "bool", "Scalar", "str", "Device", "ScalarType", "Layout", "QScheme", "SymInt"})


def _listed() -> Iterator[KnownCall]:
    """The rows without a schema, and those whose schema does not tell the whole."""
    pure, view = Behaviour.PURE, Behaviour.VIEW
    method, functional = "torch.Tensor.", "torch.nn.functional."
    for name in words(
        "size dim ndimension nelement numel element_size stride storage_offset data_ptr get_device is_contiguous "
        "is_shared is_pinned is_same_size is_floating_point is_complex is_signed is_inference dim_order item "
        "is_nonzero is_conj is_neg is_coalesced is_set_to storage_type __len__"
    ):
        yield KnownCall(method + name, pure, scalar=True, leaf=True)
    for name in words("tolist unique unique_consecutive lu norm new_tensor new"):
        yield KnownCall(method + name, pure)
    for name in words(
        "numpy float double half bfloat16 int long short char byte bool cfloat cdouble chalf cuda cpu xpu type to "
        "type_as as_subclass pin_memory dequantize contiguous requires_grad_ share_memory_ retain_grad"
    ):
        writes: tuple[Place, ...] = (0,) if name in ("requires_grad_", "share_memory_", "retain_grad") else ()
        yield KnownCall(method + name, Behaviour.MUTATES if writes else view, writes, (0,), leaf=True)
    for name in words("split unsafe_chunk unsafe_split unsafe_split_with_sizes stft istft"):
        yield KnownCall(method + name, view, aliases=(0,))

    for name in words(
        "is_tensor is_storage is_grad_enabled is_inference_mode_enabled get_default_dtype get_default_device "
        "get_num_threads finfo iinfo device Size typename can_cast promote_types result_type "
        "is_floating_point is_complex is_nonzero numel is_autocast_enabled "
        "cuda.is_available cuda.device_count cuda.current_device cuda.memory_allocated cuda.max_memory_allocated"
    ):
        yield KnownCall("torch." + name, pure, scalar=True, leaf=True)
    for name in words("tensor norm cdist tensordot block_diag lu unique unique_consecutive Generator unravel_index"):
        yield KnownCall("torch." + name, pure)
    for name in words("no_grad enable_grad inference_mode autocast amp.autocast"):
        yield KnownCall("torch." + name, pure)
    for name in words(
        "as_tensor asarray from_numpy einsum broadcast_tensors atleast_1d atleast_2d atleast_3d cartesian_prod "
        "chain_matmul meshgrid split unsafe_chunk unsafe_split unsafe_split_with_sizes stft istft "
        "dequantize nn.Parameter"
    ):
        yield KnownCall("torch." + name, view, aliases=EVERY)
    for name in words(
        "set_grad_enabled set_num_threads set_default_dtype set_default_device set_printoptions "
        "use_deterministic_algorithms set_float32_matmul_precision cuda.synchronize cuda.empty_cache "
        "cuda.reset_peak_memory_stats"
    ):
        yield KnownCall("torch." + name, Behaviour.HARMLESS)
    for name in words(
        "manual_seed seed get_rng_state set_rng_state initial_seed cuda.manual_seed cuda.manual_seed_all"
    ):
        yield KnownCall("torch." + name, Behaviour.HARMLESS, random=True)
    for name in words("pca_lowrank svd_lowrank"):
        yield KnownCall("torch." + name, pure, random=True)
    for prefix in ("torch.", functional):
        first = 1 if prefix == functional else 3
        for name in words("batch_norm instance_norm"):
            yield KnownCall(prefix + name, Behaviour.MUTATES, (first, first + 1, "running_mean", "running_var"))

    for name in words(
        "threshold relu relu6 elu selu celu leaky_relu hardtanh hardsigmoid hardswish silu mish glu softmax "
        "log_softmax softmin tanh sigmoid logsigmoid tanhshrink softsign layer_norm rms_norm group_norm "
        "local_response_norm "
        "cross_entropy nll_loss poisson_nll_loss gaussian_nll_loss kl_div binary_cross_entropy mse_loss l1_loss "
        "binary_cross_entropy_with_logits smooth_l1_loss huber_loss margin_ranking_loss hinge_embedding_loss ctc_loss "
        "multilabel_margin_loss multilabel_soft_margin_loss soft_margin_loss cosine_embedding_loss multi_margin_loss "
        "triplet_margin_loss grid_sample affine_grid adaptive_avg_pool2d adaptive_avg_pool3d "
        "lp_pool1d lp_pool2d lp_pool3d max_unpool1d max_unpool2d max_unpool3d linear normalize"
    ):
        yield KnownCall(functional + name, pure, leaf=True)
    for name in words(
        "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices"
    ):
        yield KnownCall(functional + name, pure)
    for name in words("interpolate upsample pad unfold fold"):
        yield KnownCall(functional + name, view, aliases=(0, "input"), leaf=True)
    for name in words("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout rrelu gumbel_softmax"):
        yield KnownCall(functional + name, view, aliases=(0, "input"), random=True, leaf=True)
    for name in words("fractional_max_pool2d fractional_max_pool3d"):
        yield KnownCall(functional + name, pure, random=True)
    for name in words("embedding embedding_bag"):
        # `max_norm` renormalises the weight in place; `behaviour_of` sees it.
        yield KnownCall(functional + name, pure, leaf=name == "embedding")
    yield KnownCall(functional + "multi_head_attention_forward", view, aliases=EVERY, random=True)


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
    return {row.target: row for row in _listed()}


def torch_row(target: str) -> KnownCall | None:
    """The row of a name such as `torch.Tensor.softmax`; `None` where nothing is known of it."""
    if target in _by_hand():
        return _by_hand()[target]
    for space, prefix in _SPACES.items():
        if target.startswith(space):
            name = target[len(space) :]
            if not name.isidentifier() or name.startswith("__") or name in _UNKNOWN:
                return None
            if torch_object(target) is None:
                return None
            return _derived(target, prefix + name)
    return None


@cache
def _derived(target: str, name: str) -> KnownCall | None:
    """What the schemas of all overloads of `aten::name` say, put together.

    Those for tensors with named dimensions are left aside: older versions of torch compose them of others.
    """
    schemas = [
        schema
        for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}")
        if torch._C._dispatch_has_kernel(_full_name(schema))
        and not _writes_out(schema)
        and "Dimname" not in schema.overload_name
    ]
    if not schemas:
        return None
    mutates: set[Place] = set()
    aliases: set[Place] = set()
    for schema in schemas:
        returned = {name for result in schema.returns if result.alias_info for name in result.alias_info.before_set}
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is None:
                continue
            if argument.alias_info.is_write:
                mutates |= {position, argument.name}
            # An argument that is marked and not written is there for a view, be it inside a returned list.
            if not argument.alias_info.is_write or argument.alias_info.before_set & returned:
                aliases |= {position, argument.name}
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
    )


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


def torch_identities() -> Iterator[tuple[int, str]]:
    """`id` of every callable of torch's that may have a row, with its name; cheap, since no row is derived here."""
    for target in _by_hand():
        found = torch_object(target)
        if found is not None:
            yield id(found), target
            if hasattr(found, "__wrapped__"):  # torch's compiler may have wrapped what users imported before
                yield id(found.__wrapped__), target
    for space in _SPACES:
        holder: Any = torch
        for part in space.split(".")[1:-1]:
            holder = getattr(holder, part)
        for name in _members(space):
            found = getattr(holder, name, None)
            if callable(found) and not isinstance(found, (type, ModuleType)):
                yield id(found), space + name
