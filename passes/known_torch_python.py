"""Torch's rows of the table of known calls that are written by hand: what torch defines in Python has no schema."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
import torch.nn.functional
import torch.nn.utils
import torch.optim.lr_scheduler

from nnsight_compiler.passes.behaviour import EVERY, Behaviour, KnownCall, Option, Place, words

METHOD, FUNCTIONAL, INIT, UTILS = "torch.Tensor.", "torch.nn.functional.", "torch.nn.init.", "torch.nn.utils."
OPTIM = "torch.optim."

_TENSOR_TYPES = (
    "FloatTensor DoubleTensor HalfTensor BFloat16Tensor IntTensor LongTensor ShortTensor ByteTensor CharTensor "
    "BoolTensor"
)

_SHOWN = (
    "is_grad_enabled is_inference_mode_enabled get_default_dtype get_default_device get_num_threads "
    "get_num_interop_threads get_float32_matmul_precision get_deterministic_debug_mode is_warn_always_enabled "
    "are_deterministic_algorithms_enabled is_deterministic_algorithms_warn_only_enabled is_anomaly_enabled "
    "is_anomaly_check_nan_enabled is_autocast_enabled is_autocast_cache_enabled is_autocast_cpu_enabled "
    "get_autocast_dtype get_autocast_cpu_dtype get_autocast_gpu_dtype "
    "cuda.is_available cuda.device_count cuda.current_device cuda.is_initialized cuda.get_device_name "
    "cuda.get_device_capability cuda.is_bf16_supported cuda.mem_get_info "
    "cuda.memory_allocated cuda.max_memory_allocated cuda.memory_reserved cuda.max_memory_reserved "
    "cuda.memory_summary"
)
"""What can be another each time it is asked for: settings and meters."""

_SET = (
    "set_grad_enabled set_num_threads set_num_interop_threads set_default_dtype set_default_device "
    "set_default_tensor_type set_printoptions set_flush_denormal set_warn_always set_anomaly_enabled "
    "set_deterministic_debug_mode set_float32_matmul_precision set_autocast_enabled set_autocast_dtype "
    "set_autocast_cache_enabled use_deterministic_algorithms cuda.set_device"
)

_FUNCTIONAL_PURE = """
    threshold relu relu6 elu selu celu leaky_relu hardtanh hardsigmoid hardswish silu mish glu softmax log_softmax
    softmin tanh sigmoid logsigmoid tanhshrink softsign layer_norm rms_norm group_norm local_response_norm cross_entropy
    nll_loss poisson_nll_loss gaussian_nll_loss kl_div binary_cross_entropy mse_loss l1_loss
    binary_cross_entropy_with_logits smooth_l1_loss huber_loss margin_ranking_loss hinge_embedding_loss ctc_loss
    multilabel_margin_loss multilabel_soft_margin_loss soft_margin_loss cosine_embedding_loss multi_margin_loss
    triplet_margin_loss grid_sample affine_grid adaptive_avg_pool2d adaptive_avg_pool3d lp_pool1d lp_pool2d lp_pool3d
    max_unpool1d max_unpool2d max_unpool3d linear normalize
"""


def by_hand() -> Iterator[KnownCall]:
    """The rows without a schema, and those whose schema does not tell the whole."""
    yield from _methods()
    yield from _functions()
    yield from _settings()
    yield from _functional()
    yield from _modules()
    yield from _training()


def _methods() -> Iterator[KnownCall]:
    pure, view = Behaviour.PURE, Behaviour.VIEW
    for name in words(
        "size dim ndimension nelement numel element_size stride storage_offset data_ptr const_data_ptr get_device "
        "is_contiguous is_shared is_pinned is_same_size is_floating_point is_complex is_signed is_inference dim_order "
        "item is_nonzero is_conj is_neg is_coalesced is_set_to storage_type __len__"
    ):
        yield KnownCall(METHOD + name, pure, scalar=True, leaf=True)
    for name in words("tolist unique unique_consecutive lu norm nonzero"):
        yield KnownCall(METHOD + name, pure)
    yield KnownCall(METHOD + "new_tensor", pure, leaf=True)
    yield KnownCall(METHOD + "new", view, aliases=EVERY, leaf=True)
    for name in words(
        "numpy float double half bfloat16 int long short char byte bool cfloat cdouble chalf cuda cpu xpu ipu mtia "
        "type to type_as as_subclass pin_memory dequantize contiguous to_sparse_coo"
    ):
        yield KnownCall(METHOD + name, view, aliases=(0,), leaf=True)
    for name in words("requires_grad_ share_memory_ retain_grad"):
        yield KnownCall(METHOD + name, Behaviour.MUTATES, (0,), (0,), leaf=True)
    for name in words("split unsafe_chunk unsafe_split unsafe_split_with_sizes stft istft"):
        yield KnownCall(METHOD + name, view, aliases=(0,))


def _functions() -> Iterator[KnownCall]:
    pure, view = Behaviour.PURE, Behaviour.VIEW
    for name in words(
        "is_tensor is_storage finfo iinfo device Size typename can_cast promote_types result_type broadcast_shapes "
        "is_floating_point is_complex is_nonzero numel"
    ):
        yield KnownCall("torch." + name, pure, scalar=True, leaf=True)
    for name in words("norm lu unique unique_consecutive Generator unravel_index nonzero"):
        yield KnownCall("torch." + name, pure)
    for name in words("tensor cdist tensordot block_diag"):
        yield KnownCall("torch." + name, pure, leaf=True)
    for name in words("no_grad enable_grad inference_mode autocast amp.autocast"):
        yield KnownCall("torch." + name, pure)
    for name in words("broadcast_tensors atleast_1d atleast_2d atleast_3d meshgrid split unsafe_chunk unsafe_split"):
        yield KnownCall("torch." + name, view, aliases=EVERY)
    for name in words(
        "as_tensor asarray from_numpy frombuffer from_dlpack einsum cartesian_prod chain_matmul stft istft dequantize "
        "nn.Parameter Tensor " + _TENSOR_TYPES
    ):
        yield KnownCall("torch." + name, view, aliases=EVERY, leaf=True)
    yield KnownCall("torch.unsafe_split_with_sizes", view, aliases=EVERY)
    for name in words("pca_lowrank svd_lowrank lobpcg"):
        yield KnownCall("torch." + name, pure, random=True)
    for name in words("batch_norm instance_norm"):
        yield KnownCall("torch." + name, Behaviour.MUTATES, (3, 4, "running_mean", "running_var"), leaf=True)


def _settings() -> Iterator[KnownCall]:
    for name in words(_SHOWN):
        yield KnownCall("torch." + name, Behaviour.HARMLESS, scalar=True, leaf=True)
    for name in words(_SET):
        yield KnownCall("torch." + name, Behaviour.HARMLESS, mode=True)
    for name in words("cuda.synchronize cuda.empty_cache cuda.reset_peak_memory_stats"):
        yield KnownCall("torch." + name, Behaviour.HARMLESS)
    for name in words(
        "manual_seed seed get_rng_state set_rng_state initial_seed cuda.manual_seed cuda.manual_seed_all cuda.seed "
        "cuda.seed_all cuda.initial_seed cuda.get_rng_state cuda.set_rng_state"
    ):
        yield KnownCall("torch." + name, Behaviour.HARMLESS, random=True)


def _functional() -> Iterator[KnownCall]:
    pure, view = Behaviour.PURE, Behaviour.VIEW
    first: tuple[Place, ...] = (0, "input")
    for name in words(_FUNCTIONAL_PURE):
        yield KnownCall(FUNCTIONAL + name, pure, leaf=True, options=_options(name))
    for name in words(
        "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
        "adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices"
    ):
        yield KnownCall(FUNCTIONAL + name, pure)
    yield KnownCall(FUNCTIONAL + "triplet_margin_with_distance_loss", pure, leaf=True, calls=("distance_function",))
    for name in words("interpolate upsample upsample_nearest upsample_bilinear pad unfold fold"):
        yield KnownCall(FUNCTIONAL + name, view, aliases=first, leaf=True)
    for name in words("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout rrelu gumbel_softmax"):
        yield KnownCall(
            FUNCTIONAL + name, view, aliases=(*first, "logits"), random=True, leaf=True, options=_options(name)
        )
    for name in words("fractional_max_pool2d fractional_max_pool3d"):
        yield KnownCall(FUNCTIONAL + name, pure, random=True)
        yield KnownCall(FUNCTIONAL + name + "_with_indices", pure, random=True)
    for name in words("batch_norm instance_norm"):
        yield KnownCall(FUNCTIONAL + name, Behaviour.MUTATES, (1, 2, "running_mean", "running_var"), leaf=True)
    # `max_norm` renormalises the rows of the weight that are looked up, in place.
    renormalised = Option((3, "max_norm"), (1, "weight"))
    for name in words("embedding embedding_bag"):
        yield KnownCall(FUNCTIONAL + name, pure, leaf=name == "embedding", options=(renormalised,))
    yield KnownCall(FUNCTIONAL + "multi_head_attention_forward", view, aliases=EVERY, random=True)


def _modules() -> Iterator[KnownCall]:
    """Of `torch.nn.init` and `torch.nn.utils`, what writes or makes tensors rather than changing modules."""
    first: tuple[Place, ...] = (0, "tensor")
    for name in words(
        "uniform_ normal_ trunc_normal_ xavier_uniform_ xavier_normal_ kaiming_uniform_ kaiming_normal_ orthogonal_ "
        "sparse_"
    ):
        yield KnownCall(INIT + name, Behaviour.MUTATES, first, first, random=True, leaf=True)
    for name in words("constant_ ones_ zeros_ eye_ dirac_"):
        yield KnownCall(INIT + name, Behaviour.MUTATES, first, first, leaf=True)
    yield KnownCall(INIT + "calculate_gain", Behaviour.PURE, scalar=True, leaf=True)
    for name in words("get_total_norm parameters_to_vector rnn.pad_sequence"):
        yield KnownCall(UTILS + name, Behaviour.VIEW, aliases=EVERY, leaf=True)
    for name in words("rnn.pack_padded_sequence rnn.pad_packed_sequence rnn.pack_sequence rnn.unpack_sequence"):
        yield KnownCall(UTILS + name, Behaviour.VIEW, aliases=EVERY)
    # It transposes its argument in place where the rows are not first.
    yield KnownCall(UTILS + "rnn.unpad_sequence", Behaviour.MUTATES, (0, "padded_sequences"), EVERY)


def _training() -> Iterator[KnownCall]:
    """What trains: it writes the tensors that an optimiser keeps, and the gradients of what it is given."""
    yield KnownCall("torch.autograd.grad", Behaviour.BARRIER)
    for name in words("clip_grad_norm_ clip_grad_value_ clip_grads_with_norm_"):
        yield KnownCall(UTILS + name, Behaviour.BARRIER, leaf=True)
    for name in words("SGD Adam AdamW"):
        yield KnownCall(OPTIM + name, Behaviour.BARRIER)
    for name in words("ConstantLR LinearLR StepLR MultiStepLR ExponentialLR CosineAnnealingLR"):
        yield KnownCall(f"{OPTIM}lr_scheduler.{name}", Behaviour.BARRIER)


def _options(name: str) -> tuple[Option, ...]:
    """What `inplace` makes a function of `torch.nn.functional` write, given by keyword or by position."""
    try:
        names = list(inspect.signature(getattr(torch.nn.functional, name)).parameters)
    except ValueError:  # a built-in function: it has none
        return ()
    return (Option((names.index("inplace"), "inplace"), (0, "input")),) if "inplace" in names else ()
