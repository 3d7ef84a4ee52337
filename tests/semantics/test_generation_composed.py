"""Generation together with every other feature, against HuggingFace's `generate` under hooks by hand."""

# ruff: noqa: PT012

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_compiler import CompileError, Experiment, LanguageModel, RunError, intervene

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


# --- edits, skips, stops ---


def test_an_edit_writes_at_each_step(tiny: LanguageModel) -> None:
    with tiny.edit() as edited:
        tiny.layers[0].output[:, -1] *= -2
    with edited.generate(LONG, **FOUR) as tracer:
        ids = tracer.result.save()
        hidden = list().save()
        for _ in tracer.iter[:]:
            hidden.append(edited.layers[1].output)

    def change(step: int, out: torch.Tensor) -> None:
        out[:, -1] *= -2

    wanted, seen = plain(tiny, [LONG], FOUR, h0=change)
    assert torch.equal(ids, wanted)
    assert equal(hidden, seen)
    assert not torch.equal(wanted, plain(tiny, [LONG], FOUR)[0])


@pytest.mark.parametrize("steps", ["", "for step in tracer.iter[1:3]:"])
def test_a_skip_at_each_step_or_at_some(tiny: LanguageModel, steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip = "model.layers[1].skip(model.layers[1].input * 2)"
    lines = f"        {steps}\n            {skip}" if steps else f"        {skip}"
    use = intervene.from_source(f"""
def use(model, prompt):
    with model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
{lines}
        ids = tracer.result
    return ids
""")
    found = use(tiny, LONG)
    step, layer = -1, tiny._module.transformer.h[1]
    forward = layer.forward

    def count(*_: Any) -> None:
        nonlocal step
        step += 1

    def skipped(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden * 2 if not steps or step in (1, 2) else forward(hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", skipped)
    counted = tiny._module.register_forward_pre_hook(count)
    try:
        encoded = tiny.tokenizer(LONG, return_tensors="pt")
        wanted = tiny._module.generate(encoded["input_ids"], attention_mask=encoded["attention_mask"], **FOUR)
    finally:
        counted.remove()
    assert torch.equal(found, wanted)


def test_a_stop_in_a_step_ends_the_generation(tiny: LanguageModel) -> None:
    with tiny.generate(**FOUR) as tracer:
        hidden = list().save()
        with tracer.invoke(LONG):
            for step in tracer.iter[:]:
                hidden.append(tiny.layers[1].output)
                if step == 2:
                    tracer.stop()
        with tracer.invoke(SHORT):
            first = tiny.layers[1].output.save()
        ids = tracer.result.save()
    _, seen = plain(tiny, [LONG, SHORT], FOUR)
    assert equal(hidden, [each[:1] for each in seen[:3]])
    assert torch.equal(first, seen[0][1:, 4:])
    with pytest.raises(RunError, match="`ids` does not exist: the forward was stopped before it"):
        ids.shape  # noqa: B018


# --- names inside of modules ---


def test_operations_attention_values_and_calls_at_each_step(tiny: LanguageModel) -> None:
    with tiny.generate(LONG, **FOUR) as tracer:
        inner, after, acts = list().save(), list().save(), list().save()
        for _ in tracer.iter[:]:
            tiny.layers[0].attn.z[:] *= 0.5
            inner.append(tiny.transformer.h[0].attn.source.attention_interface_1.output[0])
            tiny.layers[0].mlp.calls[0].output[:] *= -1
            acts.append(tiny.layers[1].mlp.calls[0].output)
            after.append(tiny.layers[1].resid_post)
        ids = tracer.result.save()
    module = tiny._module
    attention, mlp = module.transformer.h[0].attn.c_proj, module.transformer.h[0].mlp
    handles = [
        attention.register_forward_pre_hook(lambda _m, args: (args[0] * 0.5,)),
        mlp.register_forward_hook(lambda _m, _a, out: -out),
    ]
    try:
        wanted, seen = plain(tiny, [LONG], FOUR)
        _, inside = plain(tiny, [LONG], FOUR, "transformer.h.1.mlp")
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(ids, wanted)
    assert equal(after, seen)
    assert equal(acts, inside)
    assert [each.shape for each in inner] == [(1, 8, 4, 32), *[(1, 1, 4, 32)] * 3]


def test_the_pattern_of_an_invoke(tiny: LanguageModel) -> None:
    with tiny.generate(**FOUR) as tracer:
        patterns = list().save()
        with tracer.invoke(LONG):
            tracer.result.save()
        with tracer.invoke(SHORT):
            for _ in tracer.iter[:]:
                patterns.append(tiny.layers[0].attn.pattern)
    with tiny.generate(SHORT, **FOUR) as tracer:
        alone = list().save()
        for _ in tracer.iter[:]:
            alone.append(tiny.layers[0].attn.pattern)
    for found, wanted in zip(patterns, alone, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


# --- everything around ---


def test_gradients_of_a_generation_are_refused(tiny: LanguageModel) -> None:
    use = intervene.from_source("""
def use(model, prompt):
    with model.generate(prompt, max_new_tokens=4) as tracer:
        for step in tracer.iter[:]:
            hidden = model.layers[0].output
            with model.lm_head.output.sum().backward():
                found = hidden.grad
    return found
""")
    with pytest.raises(
        CompileError, match=r"a generation records no gradients(.|\n)*way out: run the model on the whole"
    ):
        use(tiny, LONG)


@intervene
def both(model, long, short):  # type: ignore[no-untyped-def]
    out = []
    with model.generate(max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
        with tracer.invoke(long):
            model.layers[0].output[:, -1] *= 2
            a = tracer.result
        with tracer.invoke(short):
            for _ in tracer.iter[:]:
                out.append(model.layers[1].output)
            b = tracer.result
    return a, b, out


def test_under_threads_and_modes(tiny: LanguageModel) -> None:
    def change(step: int, out: torch.Tensor) -> None:
        out[:1, -1] *= 2

    wanted, seen = plain(tiny, [LONG, SHORT], FOUR, h0=change)

    def right(found: Any) -> bool:
        values = [seen[0][1:, 4:], *(each[1:] for each in seen[1:])]
        return torch.equal(found[0], wanted[:1]) and torch.equal(found[1], wanted[1:, 4:]) and equal(found[2], values)

    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            assert right(both(tiny, LONG, SHORT))
    with ThreadPoolExecutor(4) as pool:
        assert all(map(right, pool.map(lambda _: both(tiny, LONG, SHORT), range(8))))


def test_in_bfloat16() -> None:
    model = LanguageModel("tiny", dispatch=True, dtype=torch.bfloat16)

    def change(step: int, out: torch.Tensor) -> None:
        out[:1, -1] *= 2

    wanted, seen = plain(model, [LONG, SHORT], FOUR, h0=change)
    a, b, hidden = both(model, LONG, SHORT)
    assert torch.equal(a, wanted[:1])
    assert torch.equal(b, wanted[1:, 4:])
    assert hidden[0].dtype == torch.bfloat16
    assert torch.equal(hidden[3], seen[3][1:])


def test_through_a_file(tiny: LanguageModel, tmp_path: Path) -> None:
    both.save(tmp_path / "both.safetensors")
    loaded = Experiment.load(tmp_path / "both.safetensors")
    before, after = both(tiny, LONG, SHORT), loaded(tiny, LONG, SHORT)
    assert equal(after[:2], before[:2])
    assert equal(after[2], before[2])
