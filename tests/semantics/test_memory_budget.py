"""Forwards that share rows: within a budget of memory, after memory ran out, of one length, and padded to one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_compiler import Experiment, LanguageModel, NNsight, intervene
from nnsight_compiler.runtime import batching
from nnsight_compiler.runtime import budget as budgets
from nnsight_compiler.runtime.runs import Ran, Run

LAYERS, WIDTH, VOCABULARY = 3, 48, 120


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=4, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    return LanguageModel(GPT2LMHeadModel(config).eval())


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * seed + tokens)
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)


def run_of(experiment: Experiment) -> Run:
    assert experiment.last_run is not None
    return experiment.last_run


def peak(ran: Ran) -> int:
    """The bytes that a forward had alive at once beyond those before it."""
    assert ran.measured is not None
    return ran.measured.peak


@intervene
def sweep(model, clean, corrupt, positions):
    scores = []
    with model.trace(clean):
        source = model.transformer.h[1].output.save()
    for position in positions:
        with model.trace(corrupt):
            model.transformer.h[1].output[:, position] = source[:, position]
            scores.append(model.lm_head.output[0, -1])
    return torch.stack(scores)


def swept(net: nn.Module, clean: torch.Tensor, corrupt: torch.Tensor) -> torch.Tensor:
    """The same, with hooks."""
    held: list[torch.Tensor] = []
    rows = []
    handle = net.transformer.h[1].register_forward_hook(lambda _, __, output: held.append(output))
    with torch.no_grad():
        net(clean)
        handle.remove()
        for position in range(corrupt.shape[1]):

            def patch(_: nn.Module, __: object, output: torch.Tensor, position: int = position) -> None:
                output[:, position] = held[0][:, position]

            handle = net.transformer.h[1].register_forward_hook(patch)
            rows.append(net(corrupt).logits[0, -1])
            handle.remove()
    return torch.stack(rows)


@intervene
def harvest(model, batches):
    found = []
    for batch in batches:
        with model.trace(batch):
            found.append(model.transformer.h[1].output.save())
    return found


def harvested(net: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same, with a hook."""
    held: list[torch.Tensor] = []
    handle = net.transformer.h[1].register_forward_hook(lambda _, __, output: held.append(output))
    with torch.no_grad():
        for batch in batches:
            net(batch)
    handle.remove()
    return held


# --- within a budget ---


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_sweep_stays_within_its_budget_and_makes_use_of_it(model: LanguageModel, share: float) -> None:
    clean, corrupt = ids(1, 24), ids(1, 24, 1)
    sweep.measure(model, clean, corrupt, range(24))
    whole = run_of(sweep)
    assert [ran.forwards for ran in whole.forwards] == [1, 24]
    budget = int(share * peak(whole.forwards[1]))
    experiment = sweep.with_options(memory_budget=budget)
    found = experiment.measure(model, clean, corrupt, range(24))
    torch.testing.assert_close(found, swept(model._wrapped, clean, corrupt), atol=1e-4, rtol=1e-4)
    run = run_of(experiment)
    of_sweep = run.forwards[1:]
    assert sum(ran.forwards for ran in of_sweep) == 24
    assert max(map(peak, of_sweep)) <= budget
    assert max(map(peak, of_sweep)) >= 0.5 * budget
    assert run.peak is not None
    assert run.peak <= budget + 2 * found.nbytes + WIDTH * 24 * 4  # what the program keeps itself, while it is stacked


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_what_a_harvest_adds_to_what_it_collects_stays_within_the_budget(model: LanguageModel, share: float) -> None:
    batches = [ids(2, 16 if number % 3 else 12, number) for number in range(24)]
    harvest.measure(model, batches)
    budget = int(share * max(map(peak, run_of(harvest).forwards)))
    experiment = harvest.with_options(memory_budget=budget)
    for _ in range(2):  # the second time, no forward runs past its site
        found = experiment.measure(model, batches)
        for value, other in zip(found, harvested(model._wrapped, batches), strict=True):
            torch.testing.assert_close(value, other, atol=1e-4, rtol=1e-4)
        run = run_of(experiment)
        assert sum(ran.forwards for ran in run.forwards) == 24
        assert len(run.forwards) < 24
        assert max(map(peak, run.forwards)) <= budget
        assert run.peak is not None
        assert run.peak <= budget + sum(each.nbytes for each in found)
        del found
    assert max(map(peak, run.forwards)) >= 0.4 * budget


def test_what_strands_hold_between_two_forwards_counts(model: LanguageModel) -> None:
    @intervene
    def patched(model, pairs):
        scores = []
        for clean, corrupt in pairs:
            with model.trace(clean):
                held = [layer.output.save() for layer in model.transformer.h]
            with model.trace(corrupt):
                model.transformer.h[0].output[:] = held[0]
                model.transformer.h[1].output[:, -1] = held[1][:, -1]
                model.transformer.h[2].output[:, -2] = held[2][:, -2]
                scores.append(model.lm_head.output[0, -1])
        return torch.stack(scores)

    pairs = [(ids(1, 16, number), ids(1, 16, number + 50)) for number in range(20)]
    wanted = patched.with_options(without="all")(model, pairs)
    patched.measure(model, pairs)
    whole = run_of(patched)
    assert [ran.forwards for ran in whole.forwards] == [20, 20]
    assert whole.peak is not None
    budget = whole.peak // 3
    experiment = patched.with_options(memory_budget=budget)
    found = experiment.measure(model, pairs)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    run = run_of(experiment)
    assert run.peak is not None
    assert run.peak <= budget + 2 * found.nbytes
    assert len(run.forwards) < 40


def test_a_budget_too_small_for_two_rows_has_forwards_run_one_by_one(model: LanguageModel) -> None:
    clean, corrupt = ids(1, 12), ids(1, 12, 1)
    experiment = sweep.with_options(memory_budget="100 kB")
    found = experiment(model, clean, corrupt, range(12))
    torch.testing.assert_close(found, swept(model._wrapped, clean, corrupt), atol=1e-4, rtol=1e-4)
    assert [ran.forwards for ran in run_of(experiment).forwards] == [1] * 13
    (told,) = [each for each in str(experiment.explain(model, clean, corrupt, range(12))).splitlines() if "two" in each]
    place, _, why = told.strip().partition("  merge_forwards  not done: ")
    assert place.endswith(f"test_memory_budget.py:{sweep.__wrapped__.__code__.co_firstlineno + 6}")
    assert why.startswith("forwards run one by one: two need ")
    assert why.endswith(" bytes together, more than memory_budget=100,000")


def test_without_a_budget_a_quarter_of_what_is_free_is_used(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, corrupt = ids(1, 20), ids(1, 20, 1)
    experiment = sweep.with_options()
    monkeypatch.setattr(budgets, "free_memory", lambda _: 2**40)
    experiment.measure(model, clean, corrupt, range(20))
    assert [ran.forwards for ran in run_of(experiment).forwards] == [1, 20]
    most = peak(run_of(experiment).forwards[1])
    monkeypatch.setattr(budgets, "free_memory", lambda _: 2 * most)
    experiment.measure(model, clean, corrupt, range(20))
    assert max(map(peak, run_of(experiment).forwards)) <= most // 2
    assert len(run_of(experiment).forwards) > 2


def test_small_runs_are_not_measured(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any) -> Any:
        raise AssertionError("the cost is measured")

    monkeypatch.setattr("nnsight_compiler.observations.cost_of", measured)
    experiment = sweep.with_options()
    experiment(model, ids(1, 9), ids(1, 9, 1), range(9))
    assert [ran.forwards for ran in run_of(experiment).forwards] == [1, 9]


# --- where memory runs out ---


class Scarce(nn.Module):
    """Two layers, the first of which has no memory for more than some rows."""

    def __init__(self, most: int, error: RuntimeError | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)
        self.most = most
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if len(x) > self.most:
            raise self.error
        return self.second(hidden)


FACTORS = [1.0 + number for number in range(20)]


@intervene
def scaled(model, x, factors):
    found = []
    for factor in factors:
        with model.trace(x):
            before = model.first.output.sum()
            model.first.output[:] = model.first.output * factor
            found.append(model.second.output + before)
    return found


def by_hand(net: Scarce, x: torch.Tensor) -> Iterator[torch.Tensor]:
    with torch.no_grad():
        for factor in FACTORS:
            hidden = net.first(x)
            yield net.second(hidden * factor) + hidden.sum()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.linspace(-1, 2, 6)[None]


@pytest.mark.parametrize(
    "error",
    [
        None,
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_where_memory_runs_out_half_as_many_rows_go_on(x: torch.Tensor, error: RuntimeError | None) -> None:
    torch.manual_seed(1)
    net = Scarce(6, error).eval()
    found = scaled(NNsight(net), x, FACTORS)
    for value, other in zip(found, by_hand(net, x), strict=True):
        torch.testing.assert_close(value, other)
    assert [ran.forwards for ran in run_of(scaled).forwards] == [5, 5, 5, 5]
    told = [each.what for each in run_of(scaled).remarks]
    assert told == [
        "20 forwards as rows of one ran out of memory, and go on as half as many",
        "10 forwards as rows of one ran out of memory, and go on as half as many",
    ]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_what_a_strand_changes_itself_is_not_changed_twice(x: torch.Tensor) -> None:
    @intervene
    def counted(model, x, factors):
        found = []
        for factor in factors:
            own = torch.zeros(1, 6)
            with model.trace(x):
                before = model.first.output.sum()
                own += model.first.output
                model.first.output[:] = own * factor
                found.append(model.second.output + before)
        return found

    net = Scarce(20).eval()
    found = counted(NNsight(net), x, FACTORS)
    for value, other in zip(found, by_hand(net, x), strict=True):
        torch.testing.assert_close(value, other)
    assert [ran.forwards for ran in run_of(counted).forwards] == [20]
    scarce = Scarce(6).eval()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
        counted(NNsight(scarce), x, FACTORS)
    (note,) = caught.value.__notes__
    line = counted.__wrapped__.__code__.co_firstlineno + 5
    assert note == (
        f"{__file__}:{line}:13: 20 forwards were rows of one, and cannot be run again as fewer, since what the trace"
        " does to other things is done by now\n"
        "  way out: `memory_budget=` bounds how many are, as in @intervene(memory_budget='2 GiB')"
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in scarce.modules())


def test_one_row_that_has_no_memory_is_the_models_own_error(x: torch.Tensor) -> None:
    net = Scarce(6).eval()
    model = NNsight(net)
    scaled(model, x, FACTORS)
    net.most = 0
    with pytest.raises(torch.OutOfMemoryError) as caught:
        scaled(model, x, FACTORS)
    assert not hasattr(caught.value, "__notes__")


def test_other_errors_are_not_taken_for_memory_that_ran_out() -> None:
    assert budgets.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not budgets.is_out_of_memory(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))


# --- prompts of several lengths ---


def test_inputs_of_one_length_share_a_forward(model: LanguageModel) -> None:
    lengths = (8, 5, 8, 13, 5, 8, 8, 13, 5, 8)
    batches = [ids(1, length, number) for number, length in enumerate(lengths)]
    found = harvest(model, batches)
    for value, other in zip(found, harvested(model._wrapped, batches), strict=True):
        torch.testing.assert_close(value, other, atol=1e-4, rtol=1e-4)
    ran = [(each.forwards, each.rows, each.tokens) for each in run_of(harvest).forwards]
    assert sorted(ran) == [(2, 2, 13), (3, 3, 5), (5, 5, 8)]


def test_strands_wait_until_enough_are_of_one_length(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batching.ENOUGH, "cpu", 64)
    batches = [ids(1, 8 if number % 2 else 16, number) for number in range(24)]
    found = harvest(model, batches)
    for value, other in zip(found, harvested(model._wrapped, batches), strict=True):
        torch.testing.assert_close(value, other, atol=1e-4, rtol=1e-4)
    ran = [(each.forwards, each.tokens) for each in run_of(harvest).forwards]
    assert max(forwards for forwards, _ in ran) == 4
    assert len(ran) <= 7


@pytest.fixture(scope="module")
def padding_harvest() -> Experiment:
    @intervene(padding=True)
    def collected(model, batches, vector):
        found, last = [], []
        for batch in batches:
            with model.trace(batch):
                model.transformer.h[0].output[:, 1] += vector
                found.append(model.transformer.h[1].output.save())
                last.append(model.lm_head.output[0, -1])
        return found, last

    return collected


def alone(net: nn.Module, batch: torch.Tensor, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a prompt gives by itself, with hooks."""
    held: list[torch.Tensor] = []

    def steer(_: nn.Module, __: object, output: torch.Tensor) -> None:
        output[:, 1] += vector

    handles = [net.transformer.h[0].register_forward_hook(steer)]
    handles.append(net.transformer.h[1].register_forward_hook(lambda _, __, output: held.append(output)))
    with torch.no_grad():
        logits = net(batch).logits
    for handle in handles:
        handle.remove()
    return held[0], logits[0, -1]


def test_prompts_about_as_long_are_padded_where_asked_for(model: LanguageModel, padding_harvest: Experiment) -> None:
    lengths = (16, 12, 15, 5, 13, 16, 4, 14, 30, 11)
    batches = [ids(1, length, number) for number, length in enumerate(lengths)]
    vector = torch.linspace(-1, 1, WIDTH)
    for _ in range(2):
        found, last = padding_harvest(model, batches, vector)
        for value, logits, batch in zip(found, last, batches, strict=True):
            wanted, wanted_logits = alone(model._wrapped, batch, vector)
            torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(logits, wanted_logits, atol=1e-4, rtol=1e-4)
        ran = [(each.forwards, each.tokens) for each in run_of(padding_harvest).forwards]
        assert ran == [(1, 30), (6, 16), (1, 11), (2, 5)]


def test_without_padding_each_length_has_its_forward(model: LanguageModel, padding_harvest: Experiment) -> None:
    plain = padding_harvest.with_options()
    batches = [ids(1, length, length) for length in (16, 15, 14)]
    plain(model, batches, torch.zeros(WIDTH))
    assert [each.forwards for each in run_of(plain).forwards] == [1, 1, 1]


def test_a_model_that_padding_changes_has_exact_lengths(padding_harvest: Experiment) -> None:
    class Counting(GPT2LMHeadModel):
        """Counts all positions, padding too."""

        def forward(self, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> Any:
            return super().forward(input_ids)

    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=4, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    model = LanguageModel(Counting(config).eval())
    batches = [ids(1, length, number) for number, length in enumerate((16, 15, 16, 14, 15))]
    vector = torch.linspace(-1, 1, WIDTH)
    found, _ = padding_harvest(model, batches, vector)
    for value, batch in zip(found, batches, strict=True):
        torch.testing.assert_close(value, alone(model._wrapped, batch, vector)[0], atol=1e-4, rtol=1e-4)
    run = run_of(padding_harvest)
    assert sorted(each.forwards for each in run.forwards) == [1, 2, 2]
    (told,) = [each.what for each in run.remarks]
    assert told.startswith("inputs are not padded to one length: a Counting gives other values for a prompt")


def test_generations_are_padded_where_asked_for(model: LanguageModel) -> None:
    @intervene(padding=True)
    def continued(model, prompts):
        found = []
        for prompt in prompts:
            with model.generate(prompt, max_new_tokens=3, do_sample=False) as tracer:
                found.append(tracer.result.save())
        return found

    prompts = [ids(1, length, number) for number, length in enumerate((9, 8, 10))]
    found = continued(model, prompts)
    assert [each.forwards for each in run_of(continued).forwards] == [3]
    for value, prompt in zip(found, prompts, strict=True):
        with torch.no_grad():
            wanted = model._wrapped.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert value.tolist() == wanted.tolist()


def test_prompts_that_start_from_prefixes_of_their_own_are_grouped_by_them(model: LanguageModel) -> None:
    @intervene
    def sweeps(model, prompts, vectors):
        found = []
        for prompt in prompts:
            for vector in vectors:
                with model.trace(prompt):
                    model.transformer.h[1].output[:, -1] = vector
                    found.append(model.lm_head.output[0, -1])
        return torch.stack(found)

    prompts = [ids(1, 10, number) for number in range(3)]
    vectors = [torch.linspace(-1, 1 + number, WIDTH) for number in range(4)]
    found = sweeps(model, prompts, vectors)
    torch.testing.assert_close(found, sweeps.with_options(without="all")(model, prompts, vectors), atol=1e-4, rtol=1e-4)
    assert [(each.forwards, bool(each.shared)) for each in run_of(sweeps).forwards] == [(4, True)] * 3


def test_rows_that_change_one_another_run_alone(x: torch.Tensor) -> None:
    class Mixing(Scarce):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            return self.second(hidden - hidden.mean(0) / 2)

    net = Mixing(20).eval()
    found = scaled(NNsight(net), x, FACTORS)
    with torch.no_grad():
        for value, factor in zip(found, FACTORS, strict=True):
            hidden = net.first(x)
            torch.testing.assert_close(value, net.second(hidden * factor / 2) + hidden.sum())
    assert [ran.forwards for ran in run_of(scaled).forwards] == [1] * 20
    (told,) = [each.what for each in run_of(scaled).remarks]
    assert told == (
        "forwards run one by one: `second` output cannot be shared by invokes: what one row is given changes others"
        " there"
    )
