"""Objects of known classes are the same after they were taken apart and put together; other things are refused."""

from __future__ import annotations

import collections
import sys
import typing
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BatchEncoding,
    DynamicCache,
    T5Config,
    T5ForConditionalGeneration,
    cache_utils,
)  # fmt: skip
from transformers.modeling_outputs import CausalLMOutputWithPast

from nnsight_compiler import FileError, LanguageModel, NNsight, intervene
from nnsight_compiler.remote.structures import put_together, take_apart
from nnsight_compiler.runtime.caches import ActivationCache, NotRecordedError, record
from nnsight_compiler.runtime.shares import Withheld
from tests.support.architectures import IDS, random_model

torch.set_num_threads(1)


def sent(value: Any, model: Any = None) -> Any:
    """The value as it comes out of a file: tensors and containers are copies, all else is taken apart for the way."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if kind in (list, tuple, set):
        return kind(sent(each, model) for each in value)
    if kind is dict:
        return {key: sent(each, model) for key, each in value.items()}
    apart = take_apart(value)
    if apart is None:
        assert value is None or kind in (bool, int, float, complex, str, torch.dtype, torch.device), kind
        return value
    name, parts = apart
    return put_together(name, [(key, sent(part, model)) for key, part in parts], model)


def same(left: Any, right: Any) -> bool:
    """Whether two values are of the same classes and hold the same."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        attributes = vars(left) if hasattr(left, "__dict__") else {}
        return [*left] == [*right] and all(same(left[key], right[key]) for key in left) and (
            not attributes or same(dict(attributes), dict(vars(right)))
        )  # fmt: skip
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if hasattr(left, "__dict__") and not isinstance(left, type):
        return same(vars(left), vars(right))
    return bool(left == right)


# --- transformers ---

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "mistral": {"sliding_window": 3},
    "gemma3_text": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"output_router_logits": True},
    "opt": {},
}


def state_space_model() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba", vocab_size=100, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0
    )
    return AutoModelForCausalLM.from_config(config).eval()


def hybrid_model() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "lfm2", vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", [*MODELS, "mamba", "lfm2"])
@torch.no_grad()
def test_outputs_of_models_are_whole_and_generation_goes_on_from_them(kind: str) -> None:
    made = {"mamba": state_space_model, "lfm2": hybrid_model}
    net = made[kind]() if kind in made else random_model(kind, **MODELS[kind])
    plenty: dict[str, Any] = {"output_hidden_states": True, "use_cache": True, "return_dict": True}
    output = net(IDS, **plenty)
    again = sent(output)
    assert type(again) is type(output)
    assert same(output, again)
    assert [name for name in again] == [name for name in output]
    assert again[0] is again[next(iter(output))]
    assert same(output.to_tuple()[1], again.to_tuple()[1])

    key = "cache_params" if kind == "mamba" else "past_key_values"
    caches = [getattr(output, key), getattr(again, key)]
    assert type(caches[0]) is type(caches[1])
    assert caches[1].get_seq_length() == caches[0].get_seq_length() if kind != "mamba" else True
    truth = net(torch.cat([IDS, torch.tensor([[9], [8]]), torch.tensor([[1], [2]])], 1)).logits
    for step, ids in ((0, torch.tensor([[9], [8]])), (1, torch.tensor([[1], [2]]))):
        first, second = (net(ids, **{key: cache}, use_cache=True).logits for cache in caches)
        assert torch.equal(first, second)
        torch.testing.assert_close(second[:, -1], truth[:, IDS.shape[1] + step], atol=1e-4, rtol=1e-4)
        caches[1] = sent(caches[1])


@torch.no_grad()
def test_what_a_generation_returns() -> None:
    net = random_model("gpt2")
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    output = net.generate(IDS, **given, output_scores=True, output_hidden_states=True)
    assert type(output).__name__ == "GenerateDecoderOnlyOutput"
    again = sent(output)
    assert same(output, again)
    longer = {**given, "max_new_tokens": 3}
    truth = net.generate(output.sequences, **longer, past_key_values=output.past_key_values).sequences
    assert torch.equal(net.generate(again.sequences, **longer, past_key_values=again.past_key_values).sequences, truth)


@torch.no_grad()
def test_an_encoder_decoder_with_both_its_caches() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    net = T5ForConditionalGeneration(config).eval()
    output = net(input_ids=IDS, decoder_input_ids=IDS[:, :2], use_cache=True)
    again = sent(output)
    assert same(output, again)
    assert type(again.past_key_values) is cache_utils.EncoderDecoderCache
    step = {"encoder_outputs": (output.encoder_last_hidden_state,), "decoder_input_ids": IDS[:, 2:3]}
    truth = net(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits[:, -1:]
    torch.testing.assert_close(net(**step, past_key_values=again.past_key_values).logits, truth)


def test_empty_and_lazy_caches_grow_as_they_do() -> None:
    cache = sent(DynamicCache())
    assert type(cache) is DynamicCache
    assert cache.layer_class_to_replicate is cache_utils.DynamicLayer
    keys, values = cache.update(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert cache.get_seq_length() == 3
    assert keys.sum() == 24
    assert values.sum() == 0


def test_a_field_that_holds_no_tensor_stays_what_it_is() -> None:
    """A constructor of transformers would take pairs in the first field for the fields."""
    odd = CausalLMOutputWithPast()
    odd.loss = [("logits", torch.ones(1)), ("attentions", 1)]
    again = sent(odd)
    assert same(odd, again)
    assert again.logits is None
    extended = CausalLMOutputWithPast(logits=torch.ones(1))
    extended["more"] = torch.ones(2)
    assert take_apart(extended) is None


def test_encodings() -> None:
    tokenizer = LanguageModel("tiny").tokenizer
    given = tokenizer("The Eiffel Tower", return_tensors="pt")
    again = sent(given)
    assert type(again) is BatchEncoding
    assert {key: value.tolist() for key, value in again.items()} == {
        key: value.tolist() for key, value in given.items()
    }
    assert torch.equal(again.input_ids, given["input_ids"])
    with pytest.raises(ValueError, match="not available when using Python based tokenizers"):
        again.word_ids()


def test_a_cache_whose_state_is_more_than_data_is_left_alone() -> None:
    cache = DynamicCache()
    cache.callback = print
    assert take_apart(cache) is None


class Output(CausalLMOutputWithPast):
    pass


def test_classes_that_only_look_like_those_are_left_alone() -> None:
    pretended = type("DynamicCache", (DynamicCache,), {"__module__": "transformers.cache_utils"})
    assert take_apart(pretended()) is None
    assert take_apart(Output()) is None
    assert take_apart(nn.Linear(1, 1)) is None
    assert take_apart(object()) is None


# --- torch, numpy, the standard library ---

X = torch.tensor([[3.0, 1.0, 2.0], [6.0, 5.0, 4.0]])


@pytest.mark.parametrize(
    "made",
    [
        X.topk(2), X.max(0), X.sort(), X.mode(), X.aminmax(), torch.linalg.svd(X), torch.linalg.slogdet(X[:, :2]),
        torch.frexp(X), X.unique(return_counts=True), torch.linalg.lu(X),
    ],
    ids=lambda made: type(made).__name__,
)  # fmt: skip
def test_named_results_of_torch(made: Any) -> None:
    assert same(made, sent(made))


def test_packed_sequences() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(2, 3), torch.zeros(1, 3)])
    again = sent(packed)
    assert same(packed, again)
    assert torch.equal(nn.utils.rnn.pad_packed_sequence(again)[0], nn.utils.rnn.pad_packed_sequence(packed)[0])


class Scored(typing.NamedTuple):
    value: torch.Tensor
    name: str = "none"

    def doubled(self) -> torch.Tensor:
        return self.value * 2


def test_named_tuples_of_classes_that_are_here_and_of_those_that_are_not() -> None:
    again = sent(Scored(torch.ones(2), "one"))
    assert type(again) is Scored
    assert torch.equal(again.doubled(), torch.full((2,), 2.0))

    local = collections.namedtuple("Pair", "left right")
    again = sent(local(1, [2.0]))
    assert again == (1, [2.0])
    assert (again.left, again.right, type(again).__name__) == (1, [2.0], "Pair")
    assert type(sent(local(3, 4))) is type(again)

    name, parts = take_apart(Scored(torch.ones(2), "one"))
    assert type(put_together(name, [*parts, ("more", 1)])) is not Scored


ARRAYS = [
    np.arange(6.0).reshape(2, 3), np.arange(6, dtype=np.int16)[::-2], np.array(2.5), np.array([True, False]),
    np.arange(4, dtype=">f4"), np.array([1 + 2j]), np.zeros((0, 3), np.float16), np.asfortranarray(np.eye(3)),
    np.array([1, 2**63], np.uint64), np.broadcast_to(np.float32(3), (2, 2)),
]  # fmt: skip


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{list(array.shape)}")
def test_arrays(array: np.ndarray) -> None:
    again = sent(array)
    assert type(again) is np.ndarray
    assert (again.dtype, again.shape) == (array.dtype.newbyteorder("="), array.shape)
    assert np.array_equal(again, array)


@pytest.mark.parametrize("number", [np.float32(0.1), np.int8(-3), np.bool_(True), np.float16("nan"), np.complex64(1j)])
def test_numbers_of_numpy(number: Any) -> None:
    again = sent(number)
    assert type(again) is type(number)
    assert again == number or np.isnan(number)


def test_arrays_of_other_things_are_left_alone() -> None:
    others = [np.array(["a"]), np.array([object()]), np.datetime64("2020-01-01"), np.ma.array([1]), np.longdouble(1)]
    assert [take_apart(each) for each in others] == [None] * len(others)


@pytest.mark.parametrize(
    "made",
    [
        collections.OrderedDict([("b", 1), ("a", 2)]),
        collections.Counter("hello"),
        collections.defaultdict(list, {3: [1], (1, 2): []}),
        collections.defaultdict(None, {"a": 1}),
        collections.deque([1, 2, 3], 4),
        collections.deque(),
    ],
    ids=repr,
)
def test_containers_of_the_standard_library(made: Any) -> None:
    again = sent(made)
    assert (type(again), again) == (type(made), made)
    assert list(again) == list(made)
    assert getattr(again, "default_factory", 0) is getattr(made, "default_factory", 0)
    assert getattr(again, "maxlen", 0) == getattr(made, "maxlen", 0)


def test_a_default_that_is_a_function_is_left_alone() -> None:
    assert take_apart(collections.defaultdict(lambda: 3)) is None


# --- this package ---


def test_what_a_cache_of_values_holds() -> None:
    model = NNsight(nn.Sequential(collections.OrderedDict(first=nn.Linear(2, 2), second=nn.ReLU())))

    @intervene
    def cached(model: Any, x: torch.Tensor) -> Any:
        with model.trace(x) as tracer:
            once = tracer.cache(modules=["first"], include_inputs=True)
        return once, once["first"]

    once, module = cached(model, torch.ones(1, 2))
    often = ActivationCache(model, "cpu", torch.float32, True)
    for step in range(3):
        record(often, "first", "output", torch.full((2,), float(step)), None, step)
        for call in range(2):
            record(often, "second", "output", torch.full((2,), float(call)), call, step)
    held = sent((once, often, module), model)
    assert [list(each) for each in held[:2]] == [list(once), list(often)]
    for found in (held[0].first, held[0]["first"], held[2]):
        assert same(found.output, once.first.output)
        assert same(found.inputs, once.first.inputs)
        assert same(found.input, torch.ones(1, 2))
    assert [each.tolist() for each in held[1].first.output] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert same(held[1].second.output, [[torch.zeros(2), torch.ones(2)]] * 3)
    record(held[1], "second", "output", torch.zeros(2), 0, 3)  # it goes on as the other would
    assert len(held[1].second.output) == 4
    with pytest.raises(NotRecordedError, match="was not recorded in this cache"):
        held[0]["second"]
    with pytest.raises(FileError, match="none is given here"):
        sent(once)


def test_what_no_invoke_can_be_given_says_so_afterwards_too() -> None:
    again = sent(Withheld("rows cannot be told"))
    with pytest.raises(Exception, match="rows cannot be told"):
        again[0]


# --- what does not fit ---

LAYER = "transformers.cache_utils.DynamicLayer"
CACHE = "transformers.cache_utils.DynamicCache"
NOT_LOADED = "is loaded: transformers has none here"
WRONG: dict[str, tuple[str, list[tuple[str, Any]], str]] = {
    "no class": ("os.system", [("command", "true")], "'os.system' is no class of objects that can be sent"),
    "a module of transformers": ("transformers.pipelines.Pipeline", [], "is no class of objects that can be sent"),
    "a module that is not there": ("transformers.models.evil.modeling_evil.A", [], NOT_LOADED),
    "a path": ("transformers.models.../../x.modeling_x.A", [], "is no class of objects that can be sent"),
    "a model": ("transformers.models.gpt2.modeling_gpt2.GPT2Model", [], "is no class of objects that can be sent"),
    "what a module imports": ("transformers.models.gpt2.modeling_gpt2.CausalLMOutputWithPast", [], NOT_LOADED),
    "a quantized cache's tool": ("transformers.cache_utils.Any", [], NOT_LOADED),
    "a field too many": (
        "transformers.modeling_outputs.CausalLMOutputWithPast", [("keys", X)], "has no part 'keys' like this",
    ),
    "an abstract layer": ("transformers.cache_utils.CacheLayerMixin", [("keys", X)], "no object is a CacheLayerMixin"),
    "a method": (LAYER, [("update", X)], "DynamicLayer keeps nothing as 'update'"),
    "insides": (LAYER, [("__class__", X)], "DynamicLayer keeps nothing as '__class__'"),
    "a function": (LAYER, [("keys", print)], "the part 'keys' of a DynamicLayer is no builtin_function_or_method"),
    "layers that are none": (CACHE, [("layers", [X])], "the part 'layers' of a DynamicCache is no list like this"),
    "a cache of nothing": (CACHE, [("offloading", False)], "these are not the parts of a DynamicCache"),
    "layers of another class": (
        CACHE, [("layers", []), ("layer_class_to_replicate", CACHE)], "what a cache makes more of are layers",
    ),
    "layers by any name": (
        CACHE, [("layers", []), ("layer_class_to_replicate", "builtins.print")], "no class of objects that can be sent",
    ),
    "no result": ("torch.return_types.mean", [("values", X)], "torch has no results 'mean' here"),
    "insides of results": ("torch.return_types.__name__", [], "torch has no results '__name__' here"),
    "other results": ("torch.return_types.max", [("values", X)], "the parts of max are values, indices"),
    "a named tuple's field": ("namedtuple m:A", [("import", 1)], "no named tuple is like this"),
    "a named tuple's name": ("namedtuple m:A b", [("a", 1)], "'m:A b' is no class of named tuples"),
    "an array of a list": ("numpy.ndarray", [("values", [1])], "the part 'values' of a numpy.ndarray is no list"),
    "an array of bfloat16": ("numpy.ndarray", [("values", X.bfloat16())], "no array can be made of it"),
    "objects": ("numpy.generic", [("dtype", "object"), ("value", 1)], "'object' is no dtype of a number"),
    "too large a number": ("numpy.generic", [("dtype", "int8"), ("value", 300)], "no int8 can be made of it"),
    "half a number": ("numpy.generic", [("dtype", "int8"), ("value", 1.5)], "1.5 is no int8"),
    "no pairs": ("collections.OrderedDict", [("items", (1,))], "the items of a OrderedDict are pairs"),
    "no key": ("collections.Counter", [("items", (([], 1),))], "no key of a Counter is like this"),
    "a factory": ("collections.defaultdict", [("makes", "eval"), ("items", ())], "no defaultdict makes 'eval'"),
    "too long": ("collections.deque", [("items", (1, 2)), ("most", 1)], "a deque holds no more than it may"),
    "other parts": ("collections.deque", [("items", ())], "a deque has the parts items, most, not items"),
    "parts twice": ("collections.deque", [("items", ()), ("items", ())], "two parts of one name"),
    "values of no side": (
        "nnsight_compiler.ActivationCache",
        [("device", None), ("dtype", None), ("detach", True), ("held", (("a", "b", False, False, (X,)),))],
        "what a cache holds is a path, a side, two truths and the values",
    ),
    "two values of one call": (
        "nnsight_compiler.ActivationCache",
        [("device", None), ("dtype", None), ("detach", True), ("held", (("a", "output", False, False, (X, X)),))],
        "no cache holds the output of 'a' like this",
    ),
    "inputs that are none": (
        "nnsight_compiler.ActivationCache",
        [("device", None), ("dtype", None), ("detach", True), ("held", (("a", "inputs", False, False, (X,)),))],
        "these are no values of the inputs of 'a'",
    ),
}  # fmt: skip


def test_no_module_is_imported_by_a_name_from_outside() -> None:
    module = "transformers.models.idefics.modeling_idefics"
    assert module not in sys.modules
    with pytest.raises(FileError, match="transformers has none here, or its model is another's"):
        put_together(f"{module}.IdeficsBaseModelOutputWithPast", [("last_hidden_state", X)])
    assert module not in sys.modules


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_with_the_reason(case: str) -> None:
    name, parts, reason = WRONG[case]
    with pytest.raises(FileError) as refused:
        put_together(name, parts, object())
    assert reason in str(refused.value)
