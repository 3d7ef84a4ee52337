"""Generation together with every other feature, against HuggingFace's `generate` under hooks by hand."""

# ruff: noqa: PT012

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnsight_compiler import CompileError, LanguageModel, RunError, intervene

LONG, SHORT = "The Eiffel Tower is in the city of", "Hello there"
FOUR: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
ENDS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
Change = Callable[[int, torch.Tensor], Any]


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tiny", dispatch=True)


def plain(
    tiny: LanguageModel, prompts: list[str], options: dict[str, Any], path: str = "transformer.h.1", **changes: Change
) -> tuple[Any, list[torch.Tensor]]:
    """What `generate` gives for these prompts, padded on the left, and what a module returns at each step; `changes`
    are hooks on layers, `h0=…`, given the step and the output."""
    module = tiny._module
    ids = [tiny.tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(each)) + each for each in ids])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in ids])
    step = -1
    seen: list[torch.Tensor] = []

    def count(*_: Any) -> None:
        nonlocal step
        step += 1

    handles = [module.register_forward_pre_hook(count)]
    for name, change in changes.items():
        layer = module.get_submodule(f"transformer.h.{name[1:]}")
        handles.append(layer.register_forward_hook(lambda _m, _a, out, f=change: f(step, out)))
    watched = module.get_submodule(path)
    handles.append(watched.register_forward_hook(lambda _m, _a, out: seen.append(out.clone())))
    try:
        return module.generate(padded, attention_mask=mask, **options), seen
    finally:
        for handle in handles:
            handle.remove()


def equal(found: Any, wanted: Any) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


# --- invokes ---


def test_rows_and_tokens_of_invokes_at_each_step(tiny: LanguageModel) -> None:
    with tiny.generate(**FOUR) as tracer:
        first, second = list().save(), list().save()
        with tracer.invoke(LONG):
            a = tracer.result.save()
            for _ in tracer.iter[:]:
                first.append(tiny.layers[1].output)
        with tracer.invoke(SHORT):
            start = tiny.layers[1].output[:, 0].save()
            for _ in tracer.iter[:]:
                second.append(tiny.layers[1].output)
            b = tracer.result.save()
        both = tracer.result.save()
    ids, seen = plain(tiny, [LONG, SHORT], FOUR)
    assert torch.equal(both, ids)
    assert equal(first, [each[:1] for each in seen])
    assert equal(second, [seen[0][1:, 4:], *(each[1:] for each in seen[1:])])
    assert torch.equal(start, seen[0][1:, 4])
    assert torch.equal(a, ids[:1])
    assert torch.equal(b, ids[1:, 4:])
    alone, _ = plain(tiny, [SHORT], FOUR)
    assert torch.equal(b, alone)


@pytest.mark.parametrize("inside", [True, False])
def test_an_invoke_writes_its_rows_at_its_steps(tiny: LanguageModel, inside: bool) -> None:
    if inside:
        with tiny.generate(**FOUR) as tracer:
            with tracer.invoke(LONG):
                ids = tracer.result.save()
            with tracer.invoke(SHORT):
                for step in tracer.iter[1:3]:
                    tiny.layers[0].output[:] *= -step
            both = tracer.result.save()
    else:
        with tiny.generate(**FOUR) as tracer:
            with tracer.invoke(LONG):
                ids = tracer.result.save()
            with tracer.invoke(SHORT):
                tiny.layers[0].output[:, -1] *= -2
            both = tracer.result.save()

    def change(step: int, out: torch.Tensor) -> torch.Tensor | None:
        if inside and step in (1, 2):
            out[1:] *= -step
        if not inside:
            out[1:, -1] *= -2
        return out

    wanted, _ = plain(tiny, [LONG, SHORT], FOUR, h0=change)
    assert torch.equal(both, wanted)
    assert torch.equal(ids, wanted[:1])
    assert not torch.equal(wanted[1:], plain(tiny, [LONG, SHORT], FOUR)[0][1:])


def test_steps_of_an_invoke_are_over_when_its_rows_have_ended(tiny: LanguageModel) -> None:
    long, _ = plain(tiny, [LONG], ENDS)
    short, _ = plain(tiny, [SHORT], ENDS)
    assert (long.shape[1] - 8, short.shape[1] - 4) == (3, 1)  # an end of sequence, sooner for one
    with tiny.generate(**ENDS) as tracer:
        first, second = list().save(), list().save()
        with tracer.invoke(LONG):
            for step in tracer.iter[:]:
                first.append(step)
            a = tracer.result.save()
        with tracer.invoke(SHORT):
            for step in tracer.iter[:]:
                second.append(step)
            cache = tracer.cache(modules="layers.1")
            b = tracer.result.save()
    assert first == [0, 1, 2]
    assert second == [0]
    assert len(cache["layers.1"].output) == 1
    assert torch.equal(a, long)
    assert torch.equal(b, short)


@pytest.mark.parametrize("named", ["iter[:2]", "iter[1]", "iter[1:]"])
def test_named_steps_of_an_invoke_must_come(tiny: LanguageModel, named: str) -> None:
    text = f"""
def use(model, a, b):
    with model.generate(max_new_tokens=8, do_sample=False) as tracer:
        with tracer.invoke(a):
            ids = tracer.result
        with tracer.invoke(b):
            for step in tracer.{named}:
                last = model.layers[0].output
    return ids, last
"""
    use = intervene.from_source(text)
    with pytest.raises(RunError, match="the rows of this invoke ended at an end of sequence after step 0"):
        use(tiny, LONG, SHORT)


def test_a_result_with_scores_in_an_invoke(tiny: LanguageModel) -> None:
    more = {**FOUR, "return_dict_in_generate": True, "output_scores": True}
    with tiny.generate(**more) as tracer:
        with tracer.invoke(LONG):
            kept = tiny.layers[0].output.save()
        with tracer.invoke(SHORT):
            ids = tracer.result.sequences.save()
            scores = tracer.result.scores.save()
    wanted, _ = plain(tiny, [LONG, SHORT], more)
    assert kept.shape == (1, 8, 128)
    assert torch.equal(ids, wanted.sequences[1:, 4:])
    assert equal(scores, [each[1:] for each in wanted.scores])


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_over_invokes_are_refused(tiny: LanguageModel, options: dict[str, Any]) -> None:
    refused = f"`{next(iter(options))}=2` does not go with several invokes"
    with pytest.raises(RunError, match=refused), tiny.generate(max_new_tokens=3, **options) as tracer:
        with tracer.invoke(LONG):
            tiny.layers[0].output.save()
        with tracer.invoke(SHORT):
            tiny.layers[0].output.save()


def test_an_invoke_inside_of_a_loop_over_steps_is_refused(tiny: LanguageModel) -> None:
    with (
        pytest.raises(CompileError, match="an invoke inside of a loop over steps would bring its input at each"),
        tiny.generate(max_new_tokens=3) as tracer,
    ):
        for _ in tracer.iter[:2]:
            with tracer.invoke(LONG):
                tiny.layers[0].output.save()


# --- caches ---


def test_a_cache_of_every_step_and_of_an_invoke(tiny: LanguageModel) -> None:
    with tiny.generate(**FOUR) as tracer:
        everything = tracer.cache(include_inputs=True)
        with tracer.invoke(LONG):
            a = tracer.cache(modules=["layers.1", "lm_head"])
        with tracer.invoke(SHORT):
            b = tracer.cache()
            tiny.layers[0].output[:] *= 2

    def change(step: int, out: torch.Tensor) -> None:
        out[1:, 0 if step else 4 :] *= 2  # its rows, without the padding

    _, seen = plain(tiny, [LONG, SHORT], FOUR, h0=change)
    assert equal(everything["layers.1"].output, seen)
    assert equal(everything["layers.2"].input, seen)
    assert list(a) == ["transformer.h.1", "lm_head"]
    assert equal(a["layers.1"].output, [each[:1] for each in seen])
    assert equal(b["layers.1"].output, [seen[0][1:, 4:], *(each[1:] for each in seen[1:])])
    assert [each.shape for each in b.lm_head.output] == [(1, 1, 1007)] * 4
