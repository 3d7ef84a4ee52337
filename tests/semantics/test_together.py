"""Generations, backward passes and calls of modules by rounds that run together: as if one by one, in fewer runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_compiler import LanguageModel, intervene


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3, n_embd=16, n_head=2, vocab_size=41, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    made = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(6)
    assert made.generation_config is not None
    made.generation_config.pad_token_id = 0
    return made


@pytest.fixture(scope="module")
def model(gpt2: GPT2LMHeadModel) -> LanguageModel:
    return LanguageModel(gpt2)


@contextmanager
def forwards(monkeypatch: pytest.MonkeyPatch, kind: type[torch.nn.Module]) -> Iterator[list[int]]:
    """The rows of each forward of modules of a class."""
    found: list[int] = []
    plain: Callable[..., Any] = kind.forward

    def counted(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        found.append(given.shape[0])
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "forward", counted)
        yield found


PROMPT = torch.tensor([[3, 14, 15, 9]])
STRENGTHS = [0.0, 1.0, -2.0, 30.0, -40.0]


@intervene
def steer(model, prompt, vector, strengths):
    texts = []
    for strength in strengths:
        with model.generate(prompt, max_new_tokens=6, do_sample=False) as tracer:
            model.transformer.h[1].output += strength * vector
            texts.append(tracer.result)
    return texts


@intervene
def steer_and_watch(model, prompt, vector, strengths):
    watched = []
    for strength in strengths:
        with model.generate(prompt, max_new_tokens=6, do_sample=False) as tracer:
            tokens = []
            model.transformer.h[1].output += strength * vector
            for _step in tracer.iter[:]:
                tokens.append(model.lm_head.output[0, -1].argmax())
            ids = tracer.result
        watched.append((ids, tokens))
    return watched


def steered(gpt2: GPT2LMHeadModel, vector: Tensor, strength: float, **options: Any) -> Tensor:
    """The oracle: a hook, one strength."""
    handle = gpt2.transformer.h[1].register_forward_hook(lambda module, args, output: output + strength * vector)
    try:
        return gpt2.generate(PROMPT, max_new_tokens=6, do_sample=False, **options)
    finally:
        handle.remove()


def test_generations_share_each_step(gpt2, model, monkeypatch):
    vector = torch.randn(16)
    wanted = [steered(gpt2, vector, strength) for strength in STRENGTHS]
    steer.compile(model, PROMPT, vector, STRENGTHS)
    steer(model, PROMPT, vector, STRENGTHS)
    with forwards(monkeypatch, GPT2LMHeadModel) as rows:
        found = steer(model, PROMPT, vector, STRENGTHS)
    assert rows == [5] * 6
    assert len({tuple(each[0].tolist()) for each in wanted}) > 2
    assert all(map(torch.equal, found, wanted))


def test_each_row_ends_at_its_own_end_of_sequence(gpt2, model, monkeypatch):
    vector = torch.randn(16, generator=torch.Generator().manual_seed(1))
    plain = [steered(gpt2, vector, strength)[0, 4:].tolist() for strength in STRENGTHS]
    ends = next(token for token in plain[3][:4] if any(token not in each for each in plain))
    monkeypatch.setattr(gpt2.generation_config, "eos_token_id", ends)
    wanted = [steered(gpt2, vector, strength) for strength in STRENGTHS]
    assert len({each.shape[1] for each in wanted}) > 1
    for (ids, tokens), expected in zip(steer_and_watch(model, PROMPT, vector, STRENGTHS), wanted, strict=True):
        assert torch.equal(ids, expected)
        assert [int(token) for token in tokens] == expected[0, 4:].tolist()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("do_sample=True", "tokens may be drawn"),
        ("do_sample=False, num_beams=2", "`num_beams=` may look at all rows"),
        ("do_sample=False, repetition_penalty=1.2", "`repetition_penalty=` may look at all rows"),
    ],
)
def test_generations_that_may_look_at_other_rows_stay_apart(options, why):
    source = (
        "def f(model, prompt, strengths):\n"
        "    texts = []\n"
        "    for strength in strengths:\n"
        f"        with model.generate(prompt, max_new_tokens=2, {options}) as tracer:\n"
        "            model.transformer.h[1].output *= strength\n"
        "            texts.append(tracer.result)\n"
        "    return texts\n"
    )
    made = intervene.from_source(source, {})
    torch.manual_seed(0)
    toy = LanguageModel(
        GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=11, n_positions=16)).eval()
    )
    remarks = [each for each in made.compile(toy, PROMPT % 11, [1.0]).remarks if each.optimisation == "merge_forwards"]
    assert [each.fired for each in remarks] == [False]
    assert why in remarks[0].what


# --- gradients ---

PAIRS = [(torch.randint(0, 41, (1, 5), generator=torch.Generator().manual_seed(seed)), 3 + seed) for seed in range(4)]


@intervene
def attribute(model, pairs):
    scores = []
    for prompt, token in pairs:
        with model.trace(prompt):
            values = []
            for block in model.transformer.h:
                values.append(block.attn.output[0])
                values.append(block.output)
            loss = model.lm_head.output[0, -1, token]
            with loss.backward():
                gradients = [value.grad for value in values]
        scores.append(gradients)
    return scores


@intervene
def attribute_by_function(model, pairs):
    scores = []
    for prompt, token in pairs:
        with model.trace(prompt):
            first, last = model.transformer.h[0].output, model.transformer.h[2].mlp.output
            loss = model.lm_head.output[0, -1].softmax(-1)[token].log()
            scores.append(torch.autograd.grad(loss, [first, last]))
    return scores


@intervene
def attribute_changed(model, pairs, vector):
    scores = []
    for prompt, token in pairs:
        with model.trace(prompt):
            model.transformer.h[0].output[:, -1] += vector
            late = model.transformer.h[1].output
            loss = model.lm_head.output[0, -1, token]
            with loss.backward():
                late.grad[:, 0] = 0
                gradient = late.grad.clone()
        scores.append(gradient)
    return scores


def gradients_by_hand(gpt2: GPT2LMHeadModel, prompt: Tensor, token: int) -> list[Tensor]:
    values: list[Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        value.retain_grad()
        values.append(value)

    parts = [part for block in gpt2.transformer.h for part in (block.attn, block)]
    handles = [part.register_forward_hook(keep) for part in parts]
    try:
        gpt2(prompt).logits[0, -1, token].backward()
    finally:
        for handle in handles:
            handle.remove()
        gpt2.zero_grad()
    return [value.grad for value in values if value.grad is not None]


def test_backward_passes_of_rounds_are_one(gpt2, model, monkeypatch):
    wanted = [gradients_by_hand(gpt2, *pair) for pair in PAIRS]
    attribute(model, PAIRS)
    with forwards(monkeypatch, GPT2LMHeadModel) as rows:
        found = attribute(model, PAIRS)
    assert rows == [4]
    for ours, theirs in zip(found, wanted, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in gpt2.parameters())


@pytest.mark.parametrize("name", ["attribute_by_function", "attribute_changed"])
def test_gradients_of_rounds_are_those_of_each_alone(model, name):
    experiment = globals()[name]
    given = (model, PAIRS, torch.randn(16)) if name == "attribute_changed" else (model, PAIRS)
    made = experiment.compile(*given)
    assert [each.fired for each in made.remarks if each.optimisation == "merge_forwards"] == [True]
    plain = experiment.with_options(without="all")(*given)
    flat = torch.utils._pytree.tree_leaves
    for one, other in zip(flat(experiment(*given)), flat(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@intervene
def lost(model, pairs):
    scores = []
    for prompt, token in pairs:
        with model.trace(prompt):
            late = model.transformer.h[2].output
            loss = model.transformer.h[0].output.sum() * token
            with loss.backward():
                gradient = late.grad
        scores.append(gradient)
    return scores


def test_a_loss_that_does_not_depend_on_a_value_is_refused_by_its_line(model):
    from nnsight_compiler import RunError

    with pytest.raises(RunError, match="does not depend on this value, so it has no gradient"):
        lost(model, PAIRS)


# --- calls of modules ---


@intervene
def sweep(model, prompt, vectors):
    found = []
    for vector in vectors:
        with model.trace(prompt):
            model.transformer.h[1].output[:, -1] = vector
            logits = model.lm_head.output[0, -1]
        found.append(logits.softmax(-1))
    return found


def test_the_unembedding_is_read_once_for_all_rounds(gpt2, model, monkeypatch):
    vectors = list(torch.randn(6, 16))
    sweep(model, PROMPT, vectors)
    plain, calls = type(gpt2.lm_head).forward, []

    def counted(self, given):
        if self is gpt2.lm_head:
            calls.append(tuple(given.shape))
        return plain(self, given)

    with monkeypatch.context() as patched:
        patched.setattr(type(gpt2.lm_head), "forward", counted)
        found = sweep(model, PROMPT, vectors)
    assert calls == [(6, 16)]
    for vector, ours in zip(vectors, found, strict=True):

        def patch(module, args, output, vector=vector):
            output = output.clone()
            output[:, -1] = vector
            return output

        handle = gpt2.transformer.h[1].register_forward_hook(patch)
        with torch.no_grad():
            theirs = gpt2(PROMPT).logits[0, -1].softmax(-1)
        handle.remove()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# --- rounds that must stay one after the other ---


def test_a_round_whose_input_is_what_the_one_before_gave_waits_for_it(gpt2, model):
    @intervene
    def greedy(model, ids, count):
        for _ in range(count):
            with model.trace(ids):
                token = model.lm_head.output[:, -1].argmax(-1)
            ids = torch.cat([ids, token[:, None]], 1)
        return ids

    wanted = gpt2.generate(PROMPT, max_new_tokens=4, do_sample=False)
    assert torch.equal(greedy(model, PROMPT, 4), wanted)
    (remark,) = [each for each in greedy.compile(model, PROMPT, 4).remarks if each.optimisation == "merge_forwards"]
    assert "a round needs before its forward what the round before it gives" in remark.what


def test_a_round_that_goes_on_to_the_next_runs_nothing_of_itself(model):
    @intervene
    def guarded(model, ids, count):
        kept = []
        for number in range(count):
            if number == 1:
                kept.append(0.5)
                continue
            with model.trace(ids):
                ratio = 1 / (number - 1)
                last = model.lm_head.output[0, -1, number]
            kept.append(ratio + last.item())
        return kept

    plain = guarded.with_options(without="all")(model, PROMPT, 3)
    assert guarded(model, PROMPT, 3) == pytest.approx(plain, rel=1e-4)
    remarks = [each.what for each in guarded.compile(model, PROMPT, 3).remarks if each.optimisation == "merge_forwards"]
    assert any("a round may go on to the next before it" in what for what in remarks)


def test_a_round_that_fails_does_not_keep_later_calls_apart(model, monkeypatch):
    vectors = list(torch.randn(4, 16))
    sweep(model, PROMPT, vectors)
    with pytest.raises(RuntimeError, match="expanded size"):
        sweep(model, PROMPT, [*vectors[:2], torch.randn(5), vectors[3]])
    with forwards(monkeypatch, GPT2LMHeadModel) as rows:
        sweep(model, PROMPT, vectors)
    assert rows == [1, 4]  # what the rounds share, and the rounds
