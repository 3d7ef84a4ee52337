"""The rows of torch's that are written by hand, held against real calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnsight_compiler.passes.behaviour import words
from nnsight_compiler.passes.known_calls import ALL, Behaviour, known_target
from nnsight_compiler.passes.known_torch_python import by_hand

Broken = Callable[..., str | None]

torch.manual_seed(0)
ROWS = torch.rand(3, 4)
SIGNAL = torch.rand(2, 3, 8)
IMAGE = torch.rand(2, 3, 4, 4)
VOLUME = torch.rand(2, 3, 4, 4, 4)
LABELS = torch.tensor([0, 1, 2])
SIGNS = torch.tensor([1.0, -1.0, 1.0])
TOKENS = torch.tensor([0, 1, 1])

FUNCTIONAL: dict[str, list[tuple[Any, ...]]] = {
    **{
        name: [(ROWS,), (IMAGE,)]
        for name in [
            "relu",
            "relu6",
            "elu",
            "selu",
            "celu",
            "leaky_relu",
            "hardtanh",
            "hardsigmoid",
            "hardswish",
            "silu",
            "mish",
            "glu",
            "softmin",
            "tanh",
            "sigmoid",
            "logsigmoid",
            "tanhshrink",
            "softsign",
            "normalize",
            "softmax",
            "log_softmax",
            "gumbel_softmax",
            "dropout",
            "dropout1d",
            "alpha_dropout",
            "feature_alpha_dropout",
            "rrelu",
        ]
    },
    **{
        name: [(ROWS, True), (ROWS, False), (IMAGE, False)]
        for name in words("relu relu6 hardsigmoid hardswish silu mish")
    },
    "elu": [(ROWS, 1.0), (ROWS, 1.0, True)],
    "celu": [(ROWS, 1.0), (ROWS, 1.0, True)],
    "selu": [(ROWS,), (ROWS, True)],
    "leaky_relu": [(ROWS, 0.1), (ROWS, 0.1, True)],
    "hardtanh": [(ROWS, 0.1, 0.5), (ROWS, 0.1, 0.5, True)],
    "threshold": [(ROWS, 0.5, 0.0), (ROWS, 0.5, 0.0, True)],
    "dropout": [(ROWS,), (ROWS, 0.5, False), (ROWS, 0.5, True, True), (ROWS, 0.0, True)],
    "dropout1d": [(SIGNAL,), (SIGNAL, 0.5, False)],
    "feature_alpha_dropout": [(IMAGE, 0.5, True), (IMAGE, 0.5, False)],
    "dropout2d": [(IMAGE,), (IMAGE, 0.5, False), (IMAGE, 0.5, True, True)],
    "dropout3d": [(VOLUME,), (VOLUME, 0.5, False)],
    "alpha_dropout": [(ROWS, 0.5, True), (ROWS, 0.5, False), (ROWS, 0.5, True, True)],
    "rrelu": [(ROWS, 0.1, 0.3, False), (ROWS, 0.1, 0.3, True), (ROWS, 0.1, 0.3, True, True)],
    "layer_norm": [(ROWS, (4,)), (ROWS, (4,), torch.ones(4), torch.zeros(4))],
    "rms_norm": [(ROWS, (4,))],
    "group_norm": [(IMAGE, 3), (IMAGE, 1, torch.ones(3))],
    "local_response_norm": [(IMAGE, 2)],
    "batch_norm": [
        (ROWS, torch.zeros(4), torch.ones(4), None, None, True),
        (ROWS, torch.zeros(4), torch.ones(4)),
        (ROWS, None, None, None, None, True),
    ],
    "instance_norm": [(IMAGE,), (IMAGE, torch.zeros(3), torch.ones(3))],
    "cross_entropy": [(ROWS, LABELS), (ROWS, torch.rand(3, 4))],
    "nll_loss": [(ROWS, LABELS)],
    "poisson_nll_loss": [(ROWS, ROWS)],
    "gaussian_nll_loss": [(ROWS, torch.rand(3, 4), torch.rand(3, 4)), (ROWS, torch.rand(3, 4), torch.zeros(3, 4))],
    "kl_div": [(ROWS, torch.rand(3, 4))],
    "binary_cross_entropy": [(ROWS, torch.rand(3, 4))],
    "binary_cross_entropy_with_logits": [(ROWS, torch.rand(3, 4))],
    "mse_loss": [(ROWS, torch.rand(3, 4)), (ROWS, ROWS)],
    "l1_loss": [(ROWS, torch.rand(3, 4))],
    "smooth_l1_loss": [(ROWS, torch.rand(3, 4)), (ROWS, torch.rand(3, 4), None, None, "none", 0.0)],
    "huber_loss": [(ROWS, torch.rand(3, 4))],
    "margin_ranking_loss": [(torch.rand(3), torch.rand(3), SIGNS)],
    "hinge_embedding_loss": [(torch.rand(3), SIGNS)],
    "ctc_loss": [(torch.rand(5, 1, 4).log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2]))],
    "multilabel_margin_loss": [(ROWS, torch.zeros(3, 4, dtype=torch.long))],
    "multilabel_soft_margin_loss": [(ROWS, torch.ones(3, 4))],
    "soft_margin_loss": [(torch.rand(3), SIGNS)],
    "cosine_embedding_loss": [(ROWS, torch.rand(3, 4), SIGNS)],
    "multi_margin_loss": [(ROWS, LABELS)],
    "triplet_margin_loss": [(ROWS, torch.rand(3, 4), torch.rand(3, 4))],
    "triplet_margin_with_distance_loss": [(ROWS, torch.rand(3, 4), torch.rand(3, 4))],
    "grid_sample": [(IMAGE, torch.rand(2, 4, 4, 2))],
    "affine_grid": [(torch.rand(2, 2, 3), [2, 3, 4, 4])],
    "adaptive_avg_pool2d": [(IMAGE, 2), (IMAGE, 4)],
    "adaptive_avg_pool3d": [(VOLUME, 2), (VOLUME, 4)],
    "lp_pool1d": [(SIGNAL, 2.0, 2)],
    "lp_pool2d": [(IMAGE, 2.0, 2), (IMAGE, 1.0, 1)],
    "lp_pool3d": [(VOLUME, 2.0, 2)],
    "max_unpool1d": [(*torch.nn.functional.max_pool1d_with_indices(SIGNAL, 2), 2)],
    "max_unpool2d": [(*torch.nn.functional.max_pool2d_with_indices(IMAGE, 2), 2)],
    "max_unpool3d": [(*torch.nn.functional.max_pool3d_with_indices(VOLUME, 2), 2)],
    "linear": [(ROWS, torch.rand(5, 4)), (ROWS, torch.rand(5, 4), torch.rand(5))],
    **{f"max_pool{n}d": [(x, 2), (x, 1)] for n, x in enumerate((SIGNAL, IMAGE, VOLUME), 1)},
    **{f"max_pool{n}d_with_indices": [(x, 2)] for n, x in enumerate((SIGNAL, IMAGE, VOLUME), 1)},
    **{f"adaptive_max_pool{n}d": [(x, 2), (x, 4)] for n, x in enumerate((SIGNAL, IMAGE, VOLUME), 1)},
    **{f"adaptive_max_pool{n}d_with_indices": [(x, 2)] for n, x in enumerate((SIGNAL, IMAGE, VOLUME), 1)},
    **{f"fractional_max_pool{n}d": [(x, 2, 2)] for n, x in ((2, IMAGE), (3, VOLUME))},
    **{f"fractional_max_pool{n}d_with_indices": [(x, 2, 2)] for n, x in ((2, IMAGE), (3, VOLUME))},
    "interpolate": [(IMAGE, 4), (IMAGE, 8), (IMAGE, None, 1.0)],
    "upsample": [(IMAGE, 4), (IMAGE, 8)],
    "upsample_nearest": [(IMAGE, 4)],
    "upsample_bilinear": [(IMAGE, 4), (IMAGE, 8)],
    "pad": [(ROWS, (0, 0)), (ROWS, (1, 1)), (ROWS, (-1, 0))],
    "unfold": [(IMAGE, 2), (IMAGE, 1)],
    "fold": [(torch.rand(1, 12, 9), (4, 4), 2), (torch.rand(1, 3, 16), (4, 4), 1)],
    "embedding": [(TOKENS, torch.rand(3, 4)), (TOKENS, torch.rand(3, 4) * 9, None, 1.0)],
    "embedding_bag": [(TOKENS[None], torch.rand(3, 4)), (TOKENS[None], torch.rand(3, 4) * 9, None, 1.0)],
    "multi_head_attention_forward": [
        (
            *(torch.rand(3, 1, 4), torch.rand(3, 1, 4), torch.rand(3, 1, 4), 4, 2, torch.rand(12, 4), torch.rand(12)),
            *(None, None, False, 0.0, torch.rand(4, 4), torch.rand(4)),
        )
    ],
}
"""Functions of `torch.nn.functional` that are written by hand, with arguments."""

INIT = (
    "uniform_ normal_ trunc_normal_ xavier_uniform_ xavier_normal_ kaiming_uniform_ kaiming_normal_ orthogonal_ "
    "ones_ zeros_ eye_"
)
OTHERS: dict[str, list[tuple[Any, ...]]] = {
    **{f"nn.init.{name}": [(torch.rand(4, 4),)] for name in words(INIT)},
    "nn.init.constant_": [(torch.rand(4, 4), 2.0)],
    "nn.init.sparse_": [(torch.rand(4, 4), 0.5)],
    "nn.init.dirac_": [(torch.rand(4, 4, 3),)],
    "nn.init.calculate_gain": [("relu",)],
    "nn.utils.parameters_to_vector": [([ROWS],), ([ROWS, torch.rand(2)],)],
    "nn.utils.get_total_norm": [([ROWS],), ([],)],
    "nn.utils.rnn.pad_sequence": [([torch.rand(2, 3), torch.rand(1, 3)],), ([torch.rand(2, 3)],)],
    "nn.utils.rnn.unpad_sequence": [(torch.rand(3, 2, 4), torch.tensor([3, 1]))],
    "tensor": [(2.0,), ([1.0, 2.0],)],
    "as_tensor": [(ROWS,), ([1, 2],), (ROWS.numpy(),)],
    "asarray": [(ROWS,), (ROWS.numpy(),)],
    "from_numpy": [(ROWS.numpy(),)],
    "from_dlpack": [(ROWS,)],
    "Tensor": [(ROWS,), (2, 3), ([1.0],)],
    "FloatTensor": [(ROWS,), ([1.0],)],
    "LongTensor": [([1, 2],)],
    "nn.Parameter": [(ROWS,)],
    "einsum": [("ij->ji", ROWS), ("ij,kj->ik", ROWS, ROWS), ("ii->i", torch.rand(3, 3)), ("ij->ij", ROWS)],
    "broadcast_tensors": [(ROWS, torch.rand(4))],
    "meshgrid": [(torch.rand(3), torch.rand(2))],
    "atleast_1d": [(torch.tensor(1.0),), (ROWS,), (ROWS, ROWS)],
    "atleast_2d": [(torch.tensor(1.0),), (ROWS,)],
    "atleast_3d": [(torch.tensor(1.0),), (ROWS,)],
    "cartesian_prod": [(torch.rand(3),), (torch.rand(3), torch.rand(2))],
    "chain_matmul": [(ROWS,), (ROWS, torch.rand(4, 2))],
    "split": [(ROWS, 2), (ROWS, [1, 2])],
    "block_diag": [(ROWS,), (ROWS, ROWS)],
    "tensordot": [(ROWS, torch.rand(4, 2), 1)],
    "cdist": [(ROWS, ROWS)],
    "norm": [(ROWS,), (ROWS, 2, 1)],
    "unique": [(TOKENS,), (TOKENS, True, True)],
    "unique_consecutive": [(TOKENS,)],
    "nonzero": [(ROWS,)],
    "unravel_index": [(torch.tensor(3), (2, 2))],
    "stft": [(torch.rand(64), 16, None, 16, torch.ones(16), True, "reflect", False, True, True)],
    "lobpcg": [(torch.eye(9) * 3,)],
    "svd_lowrank": [(torch.rand(6, 6), 2)],
    "pca_lowrank": [(torch.rand(6, 6), 2)],
    "batch_norm": [(ROWS, None, None, torch.zeros(4), torch.ones(4), True, 0.1, 1e-5, False)],
    "instance_norm": [(IMAGE, None, None, torch.zeros(3), torch.ones(3), True, 0.1, 1e-5, False)],
    "broadcast_shapes": [((2, 1), (1, 3))],
    "result_type": [(ROWS, 1)],
    "promote_types": [(torch.float32, torch.int64)],
    "can_cast": [(torch.float32, torch.int64)],
    "is_tensor": [(ROWS,)],
    "numel": [(ROWS,)],
    "finfo": [(torch.float32,)],
    "iinfo": [(torch.int32,)],
    "device": [("cpu",)],
    "Size": [([1, 2],)],
    "typename": [(ROWS,)],
    "no_grad": [()],
    "Generator": [()],
    **{
        f"Tensor.{name}": [(ROWS,)]
        for name in [
            "size",
            "dim",
            "numel",
            "element_size",
            "stride",
            "storage_offset",
            "data_ptr",
            "is_contiguous",
            "is_floating_point",
            "__len__",
            "tolist",
            "unique",
            "norm",
            "nonzero",
            "numpy",
            "float",
            "double",
            "half",
            "bfloat16",
            "int",
            "long",
            "cpu",
            "type",
            "contiguous",
            "sum",
            "new",
            "requires_grad_",
            "detach",
            "clone",
            "t",
            "to_dense",
        ]
    },
    "Tensor.item": [(torch.tensor(1.0),)],
    "Tensor.to": [(ROWS, torch.float32), (ROWS, torch.float64), (ROWS, "cpu")],
    "Tensor.type_as": [(ROWS, ROWS), (ROWS, TOKENS)],
    "Tensor.as_subclass": [(ROWS, torch.Tensor)],
    "Tensor.new": [(ROWS,), (ROWS, IMAGE), (ROWS, 2, 3)],
    "Tensor.new_tensor": [(ROWS, [1.0]), (ROWS, 1)],
    "Tensor.split": [(ROWS, 2), (ROWS, [1, 2])],
    "Tensor.max": [(ROWS, 0, True), (ROWS, 0, False)],
}
"""Other rows that are written by hand, and a few whose arguments the schemas do not show, with arguments."""

CASES = [(f"torch.nn.functional.{name}", each) for name, calls in FUNCTIONAL.items() for each in calls]
CASES += [(f"torch.{name}", each) for name, calls in OTHERS.items() for each in calls]


def fresh(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return list(map(fresh, value)) if isinstance(value, list) else value


@pytest.mark.parametrize(("target", "arguments"), CASES, ids=lambda part: part if isinstance(part, str) else "")
def test_rows_without_a_schema_keep_what_they_claim(
    broken_claim: Broken, target: str, arguments: tuple[Any, ...]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert broken_claim(known_target(target), list(map(fresh, arguments))) is None


@pytest.mark.parametrize(
    ("target", "keywords"),
    [
        ("torch.nn.functional.relu", {"input": ROWS, "inplace": True}),
        ("torch.nn.functional.dropout", {"input": ROWS, "training": False}),
        ("torch.nn.functional.pad", {"input": ROWS, "pad": (0, 0)}),
        ("torch.nn.functional.gumbel_softmax", {"logits": ROWS, "hard": True}),
        ("torch.nn.functional.embedding", {"input": TOKENS, "weight": ROWS * 9, "max_norm": 1.0}),
        ("torch.nn.functional.softmax", {"input": ROWS, "dim": -1, "dtype": torch.float32}),
        ("torch.nonzero", {"input": ROWS, "as_tuple": True}),
        ("torch.add", {"input": ROWS, "other": ROWS, "out": torch.zeros(3, 4)}),
        ("torch.max", {"input": ROWS, "dim": 0, "out": (torch.zeros(4), torch.zeros(4, dtype=torch.long))}),
        ("torch.nn.init.zeros_", {"tensor": ROWS}),
        ("torch.frombuffer", {"buffer": bytearray(8), "dtype": torch.float32}),
    ],
)
def test_keywords(broken_claim: Broken, target: str, keywords: dict[str, Any]) -> None:
    assert broken_claim(known_target(target), [], {name: fresh(each) for name, each in keywords.items()}) is None


def test_every_row_of_the_functional_module_is_called() -> None:
    own = {row.target for row in by_hand() if row.target.startswith("torch.nn.functional.")}
    assert own == {f"torch.nn.functional.{name}" for name in FUNCTIONAL}


@pytest.mark.parametrize(
    "target", sorted(name for name, row in ALL.items() if row.random and name.startswith("torch.nn."))
)
def test_random_rows_draw(target: str) -> None:
    """With the generator set back the same comes out, and the generator has moved."""
    arguments = dict(reversed(CASES)).get(target)
    if arguments is None or known_target(target).behaviour is Behaviour.HARMLESS:
        pytest.skip("no arguments that make it draw")
    if target.endswith(("rrelu", "multi_head_attention_forward")):
        pytest.skip("draws only in training")
    function = torch.nn.functional if ".functional." in target else torch.nn.init
    call = getattr(function, target.rpartition(".")[2])
    torch.manual_seed(1)
    first, after = call(*map(fresh, arguments)), torch.get_rng_state()
    torch.manual_seed(1)
    assert not torch.equal(after, torch.get_rng_state())
    second = call(*map(fresh, arguments))
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
