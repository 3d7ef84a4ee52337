"""Several inputs in one forward: each invoke sees what it would see alone. The oracle is plain torch, one at a time."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, LanguageModel, NNsight, intervene
from nnsight_compiler.ir.errors import ExperimentError, RunError
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.serial import from_json, to_json

LONG, SHORT, OTHER = "The Eiffel Tower is in the city of", "Hello there", "A cat sat on the"


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tiny", dispatch=True)


def alone(model: LanguageModel, prompt: Any, path: str, edit: Callable[[torch.Tensor], Any] | None = None) -> Any:
    """What the module at `path` returns for one prompt, and the logits, with plain hooks."""
    kept = {}

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        kept["h"] = hidden.clone()
        return None if edit is None else edit(hidden)

    ids = model.tokenizer([prompt], return_tensors="pt")["input_ids"] if isinstance(prompt, str) else prompt
    module = model._ready()
    handle = module.get_submodule(path).register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits = module(input_ids=ids).logits
    finally:
        handle.remove()
    return kept["h"], logits


def test_each_invoke_sees_its_own_rows_and_tokens(tiny: LanguageModel) -> None:
    with tiny.trace() as tracer:
        with tracer.invoke(LONG):
            first, first_logits = tiny.layers[1].output.save(), tiny.lm_head.output.save()
        with tracer.invoke(SHORT):
            second, second_logits = tiny.layers[1].output.save(), tiny.lm_head.output.save()
            start = tiny.layers[1].output[:, 0].save()
    for prompt, hidden, logits in ((LONG, first, first_logits), (SHORT, second, second_logits)):
        expected, expected_logits = alone(tiny, prompt, "transformer.h.1")
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(start, second[:, 0])


def test_a_value_flows_to_a_later_invoke_and_to_an_earlier_one(tiny: LanguageModel) -> None:
    @intervene
    def exchange(model: Any, one: str, other: str) -> Any:
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(one):
                early = model.layers[0].output[:, -1]
                barrier()
            with tracer.invoke(other):
                barrier()
                model.layers[1].output[:, -1] = early
                late = model.layers[0].output[:, 0]
                second = model.lm_head.output[:, -1]
            with tracer.invoke(one):
                model.layers[2].output[:, 0] = late
                third = model.lm_head.output[:, -1]
        return second, third

    second, third = exchange(tiny, LONG, SHORT)
    early = alone(tiny, LONG, "transformer.h.0")[0][:, -1]
    late = alone(tiny, SHORT, "transformer.h.0")[0][:, 0]

    def last(hidden: torch.Tensor) -> None:
        hidden[:, -1] = early

    def first(hidden: torch.Tensor) -> None:
        hidden[:, 0] = late

    torch.testing.assert_close(second, alone(tiny, SHORT, "transformer.h.1", last)[1][:, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(third, alone(tiny, LONG, "transformer.h.2", first)[1][:, -1], atol=1e-4, rtol=1e-4)


def test_a_replacement_changes_the_rows_of_its_invoke_only(tiny: LanguageModel) -> None:
    @intervene
    def doubled(model: Any, one: str, other: str) -> Any:
        with model.trace() as tracer:
            with tracer.invoke(one):
                plain = model.lm_head.output
            with tracer.invoke(other):
                hidden = model.layers[1].output
                model.layers[1].output = hidden * 2
                changed = model.lm_head.output
        return plain, hidden, changed

    plain, hidden, changed = doubled(tiny, LONG, SHORT)
    before, expected = alone(tiny, SHORT, "transformer.h.1", lambda hidden: hidden * 2)
    torch.testing.assert_close(plain, alone(tiny, LONG, "transformer.h.1")[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden, before, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_invokes_in_a_loop_over_prompts(tiny: LanguageModel, count: int) -> None:
    prompts = [LONG, SHORT, OTHER][:count]

    @intervene
    def all_of(model: Any, prompts: list[str]) -> Any:
        kept = []
        with model.trace() as tracer:
            for prompt in prompts:
                with tracer.invoke(prompt):
                    kept.append(model.layers[2].output)
        return kept

    for prompt, hidden in zip(prompts, all_of(tiny, prompts), strict=True):
        torch.testing.assert_close(hidden, alone(tiny, prompt, "transformer.h.2")[0], atol=1e-5, rtol=1e-4)
    others = [OTHER, LONG, SHORT][:count]  # the same program serves them
    for prompt, hidden in zip(others, all_of(tiny, others), strict=True):
        torch.testing.assert_close(hidden, alone(tiny, prompt, "transformer.h.2")[0], atol=1e-5, rtol=1e-4)
    assert all_of.cache_info().misses == 1


def test_an_invoke_without_input_and_the_body_around_see_all_rows(tiny: LanguageModel) -> None:
    with tiny.trace() as tracer:
        with tracer.invoke(LONG):
            first = tiny.lm_head.output.save()
        with tracer.invoke(SHORT):
            second = tiny.lm_head.output.save()
        with tracer.invoke():
            everything = tiny.lm_head.output.save()
        around = tiny.lm_head.output.save()
    assert everything.shape[0] == 2
    assert torch.equal(everything, around)
    assert torch.equal(everything[0:1], first)
    assert torch.equal(everything[1:2, -second.shape[1] :], second)


def test_inputs_of_every_kind(tiny: LanguageModel) -> None:
    encode = tiny.tokenizer
    tensor = torch.tensor(encode([OTHER])["input_ids"])
    with tiny.trace() as tracer:
        with tracer.invoke([LONG, SHORT]):
            pair = tiny.layers[0].output.save()
        with tracer.invoke(encode(SHORT)["input_ids"]):
            ids = tiny.layers[0].output.save()
        with tracer.invoke(tensor):
            of_tensor = tiny.layers[0].output.save()
        with tracer.invoke(encode([SHORT, SHORT], return_tensors="pt")):
            encoded = tiny.layers[0].output.save()
        with tracer.invoke(input_ids=tensor):
            named = tiny.layers[0].output.save()
    expected = {prompt: alone(tiny, prompt, "transformer.h.0")[0] for prompt in (LONG, SHORT, OTHER)}
    tokens = expected[SHORT].shape[1]
    close = {"atol": 1e-5, "rtol": 1e-4}
    assert pair.shape == (2, expected[LONG].shape[1], 128)  # one rectangle, as alone
    torch.testing.assert_close(pair[:1], expected[LONG], **close)
    torch.testing.assert_close(pair[1:, -tokens:], expected[SHORT], **close)
    torch.testing.assert_close(ids, expected[SHORT], **close)
    torch.testing.assert_close(of_tensor, expected[OTHER], **close)
    torch.testing.assert_close(named, expected[OTHER], **close)
    torch.testing.assert_close(encoded, expected[SHORT].expand(2, -1, -1), **close)


def test_a_saved_value_holds_its_rows_and_no_more() -> None:
    net = NNsight(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))

    @intervene
    def one_of_many(model: Any, inputs: list[torch.Tensor]) -> Any:
        with model.trace() as tracer:
            for number, x in enumerate(inputs):
                with tracer.invoke(x):
                    if number == 40:
                        kept = model[0].output
        return kept

    inputs = [torch.randn(1, 8) for _ in range(100)]
    kept = one_of_many(net, inputs)
    torch.testing.assert_close(kept, net._module[0](inputs[40]).detach())
    assert kept.untyped_storage().nbytes() == 8 * 4


def test_the_cost_of_writes_is_one_copy_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    net = NNsight(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))

    @intervene
    def all_doubled(model: Any, inputs: list[torch.Tensor]) -> Any:
        kept = []
        with model.trace() as tracer:
            for x in inputs:
                with tracer.invoke(x):
                    model[0].output = model[0].output * 2
                    kept.append(model[1].output)
        return kept

    inputs = [torch.randn(1, 8) for _ in range(50)]
    all_doubled(net, inputs)
    rows = 0
    clone = torch.Tensor.clone

    def counted(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        nonlocal rows
        rows += tensor.shape[0]
        return clone(tensor, **options)

    monkeypatch.setattr(torch.Tensor, "clone", counted)
    kept = all_doubled(net, inputs)
    monkeypatch.undo()
    assert rows <= 2 * 50  # one copy of the whole for the writes, and each invoke's own row for what is kept
    for x, found in zip(inputs, kept, strict=True):
        torch.testing.assert_close(found, net._module[1](net._module[0](x) * 2).detach())


class Table(nn.Module):
    """Returns a constant beside what depends on the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.table = TableOnly()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.table(x).sum(0)


class TableOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.arange(6.0).view(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.values * 1


def test_a_constant_of_as_many_rows_as_the_batch_is_served_whole() -> None:
    net = NNsight(Table())
    with net.trace() as tracer:
        with tracer.invoke(torch.ones(1, 3)):
            first = net.table.output.save()
        with tracer.invoke(torch.zeros(1, 3)):
            second = net.table.output.save()
            out = net.output.save()
    assert torch.equal(first, torch.arange(6.0).view(2, 3))
    assert torch.equal(second, first)
    assert torch.equal(out, net._module(torch.zeros(1, 3)).detach())


def test_it_may_not_be_assigned_for_one_invoke() -> None:
    net = NNsight(Table())

    @intervene
    def assigned(model: Any, x: torch.Tensor) -> Any:
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.table.output = torch.zeros(2, 3)
                out = model.output
            with tracer.invoke(x):
                pass
        return out

    with pytest.raises(
        RunError, match="is one for all rows, and an invoke cannot change it for its own alone"
    ) as caught:
        assigned(net, torch.ones(1, 3))
    assert re.search(r"test_invokes\.py:\d+:\d+", str(caught.value))


def test_nor_written_in_place() -> None:
    net = NNsight(Table())

    @intervene
    def written(model: Any, x: torch.Tensor) -> Any:
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.table.output[0] = 5
                out = model.output
            with tracer.invoke(x):
                pass
        return out

    for mode in (torch.enable_grad, torch.inference_mode):
        with mode(), pytest.raises(RunError, match="an invoke writes in place to `table` output, which is one for all"):
            written(net, torch.ones(1, 3))


def test_a_value_of_other_rows_is_refused_with_its_line() -> None:
    net = NNsight(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))

    @intervene
    def assigned(model: Any, x: torch.Tensor, value: torch.Tensor) -> Any:
        with model.trace() as tracer:
            with tracer.invoke(x):
                model[0].output = value
                out = model.output
            with tracer.invoke(x):
                pass
        return out

    with pytest.raises(
        CompileError, match=r"a tensor of shape \[2, 4\] is assigned where the module gives \[1, 4\]"
    ) as caught:
        assigned(net, torch.ones(1, 4), torch.ones(2, 4))
    assert caught.value.diagnostics[0].span.line
    assigned(net, torch.ones(1, 4), torch.ones(1, 4))
    with pytest.raises(RunError, match=r"a tensor of shape \[2, 4\] is assigned where the module gives \[1, 4\]"):
        assigned(net, torch.ones(1, 4), torch.ones(2, 4))  # what was compiled serves it, until it does not fit


REFUSED = [
    (
        "with model.trace(x) as tracer:\n  with tracer.invoke(x): pass\n  out = model.output",
        "the trace brings an input of its own, and so does this invoke",
        2,
    ),
    (
        "with model.trace() as tracer:\n  with tracer.invoke(x):\n    out = model.output\n"
        "    with tracer.invoke(x): pass",
        "an invoke cannot stand inside of another",
        4,
    ),
    (
        "with model.trace() as tracer:\n  with tracer.invoke(x): out = model.output\nwith tracer.invoke(x): pass",
        "an invoke is a part of one forward, and that of this tracer is not running here",
        3,
    ),
    ("with model.trace() as tracer:\n  out = model.output", "this forward is given no input", 1),
    (
        "with model.trace() as tracer:\n  with tracer.invoke():\n    out = model.output",
        "this forward is given no input",
        1,
    ),
    (
        "with model.trace() as tracer:\n  with x.invoke(x):\n    out = model.output",
        "`.invoke(…)` is a method of what a trace binds",
        2,
    ),
    ("with model.trace(x) as tracer:\n  tracer.invoke(x)\n  out = model.output", "`.invoke(…)` without `with` runs", 2),
    (
        "with model.trace() as tracer:\n  with tracer.invoke(x):\n    h = model[0].output\n  with tracer.invoke(h):\n"
        "    out = model.output",
        "this invoke is given a value that only the forward which it is a part of can give",
        4,
    ),
    (
        "with model.trace() as tracer:\n  with tracer.invoke(x):\n    h = model[0].output\n  if h.sum() > 0:\n"
        "    with tracer.invoke(x): pass\n  out = model.output",
        "whether there is this invoke must be known before the model runs, but only a run can give it",
        5,
    ),
    (
        "with model.trace() as tracer:\n  with tracer.invoke(x):\n    model[1].output = 0\n  with tracer.invoke(x):\n"
        "    out = model.output",
        "this write can reach nothing",
        3,
    ),
    (
        "with model.trace() as tracer:\n  with tracer.invoke(x):\n    out = model.output\n"
        "  with tracer.invoke(y):\n    pass",
        "`0` of invoke 1 is float32 of shape [1, 5], and that of invoke 0 float32 of shape [1, 4]",
        1,
    ),
]


@pytest.mark.parametrize(("body", "reason", "line"), REFUSED)
def test_what_is_refused(body: str, reason: str, line: int) -> None:
    lines = "\n".join(f"    {each}" for each in body.splitlines())
    experiment = intervene.from_source(f"def use(model, x, y):\n{lines}\n    return out\n")
    with pytest.raises(CompileError, match=re.escape(reason)) as caught:
        experiment(NNsight(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), torch.ones(1, 4), torch.ones(1, 5))
    assert caught.value.diagnostics[0].span.line == line + 1


def test_an_input_that_cannot_be_joined_at_a_later_call(tiny: LanguageModel) -> None:
    net = NNsight(nn.Linear(4, 4))

    @intervene
    def both(model: Any, one: torch.Tensor, other: torch.Tensor) -> Any:
        with model.trace() as tracer:
            with tracer.invoke(one):
                first = model.output
            with tracer.invoke(other):
                second = model.output
        return first, second

    one, three = torch.randn(1, 4), torch.randn(3, 4)
    for pair in ((one, three), (three, one)):
        for x, found in zip(pair, both(net, *pair), strict=True):
            torch.testing.assert_close(found, net._module(x).detach())
    with pytest.raises(RunError, match=r"test_invokes\.py:\d+:\d+: `0` of invoke 1 is float64 of shape \[1, 4\]"):
        both(net, one, one.double())


def test_it_is_the_same_undecorated_in_one_line(tiny: LanguageModel) -> None:
    with tiny.trace() as tracer, tracer.invoke(SHORT):
        hidden = tiny.layers[1].output.save()
    torch.testing.assert_close(hidden, alone(tiny, SHORT, "transformer.h.1")[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ExperimentError, match="this forward is given no input"), tiny.trace():
        tiny.output.save()


PADDED = [
    ("with model.trace([long, short]):\n  out = model.layers[0].output[:, 0]", 2),
    ("with model.trace([long, short]):\n  out = model.layers[0].output[1, position]", 2),
    ("with model.trace([long, short]):\n  model.layers[0].output[1, 2] = 0\n  out = model.output", 2),
    (
        "with model.trace() as tracer:\n  with tracer.invoke([short, long]):\n    out = model.layers[0].output[:, 1]\n"
        "  with tracer.invoke(long): pass",
        3,
    ),
    ("with model.trace() as tracer:\n  with tracer.invoke([short, long]):\n    out = model.layers[0].output[:, 1]", 3),
]


@pytest.mark.parametrize(("body", "line"), PADDED)
def test_a_constant_position_on_padding(tiny: LanguageModel, body: str, line: int) -> None:
    lines = "\n".join(f"    {each}" for each in body.splitlines())
    text = f"def use(model, long, short, position):\n{lines}\n    return out\n"
    with pytest.raises(CompileError, match=r"is padding in prompt [01], which has 4 tokens") as caught:
        intervene.from_source(text)(tiny, LONG, SHORT, 3)
    assert caught.value.diagnostics[0].span.line == line + 1
    assert "`with tracer.invoke(prompt):`" in caught.value.diagnostics[0].way_out


@pytest.mark.parametrize("index", ["[0, 0]", "[:, -1]", "[:, -4]", "[1, 4]", "[:, position]", "[0:1, 2]"])
def test_positions_that_are_not(tiny: LanguageModel, index: str) -> None:
    body = f"    with model.trace([long, short]):\n        out = model.layers[0].output{index}\n"
    text = f"def use(model, long, short, position):\n{body}    return out\n"
    assert intervene.from_source(text)(tiny, LONG, SHORT, 5).isfinite().all()


@intervene
def exchanged(model: Any, one: str, other: str) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(one):
            hidden = model.layers[1].output[:, -1]
        with tracer.invoke(other):
            model.layers[1].output[:, -1] = hidden
            logits = model.lm_head.output[:, -1]
    return logits


@intervene
def mistaken(model: Any, one: Any, other: Any) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(one):
            hidden = model.layers[1].output[:, :, 999]
        with tracer.invoke(other):
            logits = model.lm_head.output[:, 4]
    return hidden, logits


def test_the_program_is_told_checked_and_kept_as_others_are(tiny: LanguageModel, tmp_path: Path) -> None:
    expected = exchanged(tiny, LONG, SHORT)
    assert "2 invokes; " in str(exchanged.explain(tiny, LONG, SHORT))
    program = exchanged.lower(tiny, LONG, SHORT).program
    assert parse_program(str(program)) == program
    assert from_json(to_json(program)) == program
    exchanged.save(tmp_path / "exchanged.safetensors")
    loaded = type(exchanged).load(tmp_path / "exchanged.safetensors", tiny)
    assert torch.equal(loaded(tiny, LONG, SHORT), expected)
    reasons = [each.reason for each in mistaken.check("tiny", LONG, SHORT).diagnostics]
    assert reasons == [
        "index 999 is out of range: this dimension has 128 entries",
        "index 4 is out of range: this dimension (tokens) has 4 entries",  # its own, not those of the longer prompt
    ]
    assert exchanged.check("tiny", LONG, SHORT).ok


def test_threads_modes_and_dtypes(tiny: LanguageModel) -> None:
    expected = {prompt: exchanged(tiny, prompt, SHORT) for prompt in (LONG, OTHER)}
    found: list[tuple[str, torch.Tensor]] = []
    threads = [
        threading.Thread(target=lambda prompt=prompt: found.append((prompt, exchanged(tiny, prompt, SHORT))))
        for prompt in [LONG, OTHER] * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(value, expected[prompt]) for prompt, value in found)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(exchanged(tiny, LONG, SHORT), expected[LONG])
    half = LanguageModel("tiny", dtype=torch.bfloat16)
    logits = exchanged(half, LONG, SHORT)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected[LONG], atol=0.5, rtol=0.1)


def test_gradients_reach_what_an_invoke_brings_through_its_rows_alone(tiny: LanguageModel) -> None:
    vector = torch.zeros(128, requires_grad=True)

    @intervene
    def steered(model: Any, one: str, other: str, vector: torch.Tensor) -> Any:
        with model.trace() as tracer:
            with tracer.invoke(one):
                model.layers[1].output = model.layers[1].output + vector
                first = model.lm_head.output[:, -1]
            with tracer.invoke(other):
                second = model.lm_head.output[:, -1]
        return first, second

    first, second = steered(tiny, SHORT, LONG, vector)
    (of_other,) = torch.autograd.grad(second.sum(), vector, retain_graph=True, allow_unused=True)
    assert of_other is None or not of_other.any()
    (found,) = torch.autograd.grad(first.square().sum(), vector)
    module = tiny._ready()
    handle = module.transformer.h[1].register_forward_hook(lambda _, args, output: output + vector)
    ids = tiny.tokenizer([SHORT], return_tensors="pt")["input_ids"]
    (expected,) = torch.autograd.grad(module(input_ids=ids).logits[:, -1].square().sum(), vector)
    handle.remove()
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-3)
    assert not any(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("module", [nn.LSTM(4, 4), nn.Sequential(nn.Linear(4, 4), Mean())], ids=["time", "mean"])
def test_rows_that_see_each_other_are_refused(module: nn.Module) -> None:
    net = NNsight(module)
    shape = (2, 1, 4) if isinstance(module, nn.LSTM) else (2, 4)

    @intervene
    def both(model: Any, x: torch.Tensor) -> Any:
        with model.trace() as tracer:
            with tracer.invoke(x):
                first = model.output
            with tracer.invoke(x):
                pass
        return first

    with pytest.raises(RunError, match="`the model` output cannot be shared by invokes: what one row is given changes"):
        both(net, torch.ones(shape))


class Halves(nn.Module):
    """Gives all first halves before all second ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = self.inner(torch.cat([x[:, :2], x[:, 2:]]))
        return torch.cat(halves.chunk(2), 1)


def test_rows_that_are_not_one_after_the_other_are_refused() -> None:
    @intervene
    def inner(model: Any, x: torch.Tensor) -> Any:
        with model.trace() as tracer:
            with tracer.invoke(x):
                first = model.inner.output
            with tracer.invoke(x):
                pass
        return first

    with pytest.raises(RunError, match="`inner` output cannot be shared by invokes"):
        inner(NNsight(Halves()), torch.ones(1, 4))


def test_a_value_in_a_dict_from_outside_lets_later_invokes_write_earlier_modules():
    net, kept = NNsight(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), {}
    a, b = torch.ones(1, 4), torch.zeros(1, 4)
    with net.trace() as tracer:
        with tracer.invoke(a):
            net[0].output *= 2
            kept["a"] = net.output
        with tracer.invoke(b):
            net[0].output *= 2
            kept["b"] = net.output
    for name, x in (("a", a), ("b", b)):
        assert torch.allclose(kept[name], net._module[1](2 * net._module[0](x)))
