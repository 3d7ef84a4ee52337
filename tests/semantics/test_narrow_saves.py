"""What is kept of saved values: that it is right, against torch hooks, and how many bytes it holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import IDS

from nnsight_compiler import intervene

ROWS, TOKENS = IDS.shape


def narrowed(experiment: Any, *args: Any) -> list[str]:
    found = experiment.compile(*args).remarks
    return [each.what for each in found if each.fired and each.optimisation == "narrow" and "kept" in each.what]


def refused(experiment: Any, *args: Any) -> list[str]:
    found = experiment.compile(*args).remarks
    return [each.what for each in found if not each.fired and each.optimisation == "narrow" and "kept" in each.what]


@pytest.fixture
def streams(either, hooked) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """The output of each block, by plain hooks."""
    model, plain, path = either

    def collected(ids: torch.Tensor) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}

        def keep(out: Any, number: int) -> None:
            found[number] = (out if isinstance(out, torch.Tensor) else out[0]).clone()

        hooked(
            plain,
            ids,
            *(
                (f"{path}.{number}", "output", lambda out, n=number: keep(out, n))
                for number in range(len(model.layers))
            ),
        )
        return [found[number] for number in range(len(model.layers))]

    return collected


def held(experiment: Any, *args: Any) -> int:
    """The bytes of the storages that an experiment has made when it calls what it is given last."""
    experiment(*args, lambda: None)  # compiled, and all that stays is there
    before = live()
    found: list[int] = []
    experiment(*args, lambda: found.append(sum(size for at, size in live().items() if at not in before)))
    (size,) = found
    return size


def live() -> dict[int, int]:
    gc.collect()
    found: dict[int, int] = {}
    for each in gc.get_objects():
        if type(each) is torch.Tensor and each.layout is torch.strided:  # others' sparse tensors have none
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


NUMBER = 4
"""The bytes of a number."""

# --- a value that is saved ---


@intervene
def last(model, ids, position, look):
    with model.trace(ids):
        hidden = model.layers[1].output.save()
        model.layers[1].output[:] = 0
        logits = model.lm_head.output[:, -1, :3]
    look()
    return hidden[:, -1], hidden[0, position], logits


def test_a_save_is_of_what_is_used_of_it_as_it_is_there(either, streams) -> None:
    model = either[0]
    end, one, _ = last(model, IDS, 2, int)
    wanted = streams(IDS)[1]
    assert torch.equal(end, wanted[:, -1])
    assert torch.equal(one, wanted[0, 2])
    assert narrowed(last, model, IDS, 2, int) == [
        f"of the output of `{either[2]}.1`, `[:, -1]`, `[0, position]` alone is kept"
    ]
    width = wanted.shape[-1]
    assert held(last, model, IDS, 2) == NUMBER * (ROWS * width + width + ROWS * 3)


def test_positions_are_numbers_of_each_call(either, streams) -> None:
    model = either[0]
    last.cache_clear()
    for ids in (IDS, IDS[:1, :3]):
        for position in (0, 1, -2, slice(0, 2), [0, 1], torch.tensor([1])):
            _, part, _ = last(model, ids, position, int)
            assert torch.equal(part, streams(ids)[1][0, position])
    with pytest.raises(IndexError, match="out of"):
        last(model, IDS, TOKENS, int)


@intervene
def after(model, ids):
    with model.trace(ids):
        hidden = model.layers[1].output
        model.layers[1].output[:, -1] += 1
        logits = model.lm_head.output[:, -1]
    return hidden[:, -1], hidden.float().mean(dim=(0, 1)), logits


def test_what_is_not_saved_is_as_it_is_after_the_last_access(either, streams) -> None:
    model = either[0]
    end, mean, _ = after(model, IDS)
    wanted = streams(IDS)[1]
    wanted[:, -1] += 1
    assert torch.equal(end, wanted[:, -1])
    torch.testing.assert_close(mean, wanted.mean(dim=(0, 1)))
    assert end.untyped_storage().nbytes() == end.numel() * NUMBER
    assert narrowed(after, model, IDS)


@intervene
def patched(model, clean, corrupt, layers, position):
    found = []
    for layer in layers:
        with model.trace(clean):
            source = model.layers[layer].output
        with model.trace(corrupt):
            model.layers[layer].output[:, position] = source[:, position]
            found.append(model.lm_head.output[0, -1])
    return found


def test_what_another_forward_takes_is_kept_alone(either, hooked, streams, clean, corrupt) -> None:
    model, plain, path = either
    found = patched(model, clean, corrupt, [0, 2], 3)
    for layer, logits in zip([0, 2], found, strict=True):
        source = streams(clean)[layer][:, 3]

        def put(out: Any, source: torch.Tensor = source) -> None:
            (out if isinstance(out, torch.Tensor) else out[0])[:, 3] = source

        wanted = hooked(plain, corrupt, (f"{path}.{layer}", "output", put)).logits[0, -1]
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(narrowed(patched, model, clean, corrupt, [0, 2], 3)) == 2


@intervene
def part(model, ids):
    with model.trace(ids):
        attention = model.layers[0].attn.output.save()
        heads = model.layers[1].attn.output[0].save()
    return attention[0][:, -1], heads.sum(dim=(0, 1))


def test_parts_of_what_a_module_returns(either, grab) -> None:
    model, plain, path = either
    name = "attn" if path == "transformer.h" else "self_attn"
    one, two = part(model, IDS)
    torch.testing.assert_close(one, grab(plain, IDS, f"{path}.0.{name}")[:, -1])
    torch.testing.assert_close(two, grab(plain, IDS, f"{path}.1.{name}").sum(dim=(0, 1)))
    assert narrowed(part, model, IDS) == [
        f"of the output of `{path}.0.{name}`, `[0][:, -1]` alone is kept",
        f"of a part of the output of `{path}.1.{name}`, `.sum(dim=(0, 1))` alone is kept",
    ]


# --- lists and dicts ---


@intervene
def in_a_list(model, ids, look):
    acts = []
    with model.trace(ids):
        for layer in model.layers:
            acts.append(layer.output.save())
    look()
    return torch.stack([each.norm(dim=-1) for each in acts])


@intervene
def in_a_comprehension(model, ids, look):
    with model.trace(ids):
        acts = [layer.output for layer in model.layers]
    look()
    return torch.stack([torch.norm(each, dim=-1) for each in acts])


@intervene
def in_a_dict(model, ids, look):
    acts = {}
    with model.trace(ids):
        for number, layer in enumerate(model.layers):
            acts[number] = layer.output.save()
    look()
    found = {}
    for number, each in acts.items():
        found[number] = each.norm(dim=-1)
    return torch.stack([found[number] for number in range(len(acts))])


@intervene
def put_afterwards(model, ids, look):
    acts = []
    for number in range(3):
        with model.trace(ids):
            hidden = model.layers[number].output
        acts.append(hidden)
    look()
    return torch.stack([each.norm(dim=-1) for each in acts])


@pytest.mark.parametrize("experiment", [in_a_list, in_a_comprehension, in_a_dict, put_afterwards])
def test_entries_that_are_reduced_are_kept_reduced(either, streams, experiment: Any) -> None:
    model = either[0]
    wanted = torch.stack([each.norm(dim=-1) for each in streams(IDS)])
    torch.testing.assert_close(experiment(model, IDS, int), wanted)
    assert held(experiment, model, IDS) == NUMBER * wanted.numel()


@intervene
def at_a_position(model, ids, position, look):
    with model.trace(ids):
        acts = [layer.output for layer in model.layers]
    look()
    return [acts[number][:, position] for number in range(len(model.layers))]


def test_entries_of_which_one_position_is_used_hold_that(either, streams) -> None:
    model = either[0]
    found, wanted = at_a_position(model, IDS, 2, int), streams(IDS)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other[:, 2])
    assert held(at_a_position, model, IDS, 2) == NUMBER * sum(each[:, 2].numel() for each in wanted)


@intervene
def by_number(model, ids, look):
    with model.trace(ids):
        acts = [layer.output.save() for layer in model.layers]
    look()
    return acts[0][:, -1], acts[-1].mean(1)


def test_entries_of_a_known_number_are_kept_by_themselves(either, streams) -> None:
    model = either[0]
    first, mean = by_number(model, IDS, int)
    wanted = streams(IDS)
    assert torch.equal(first, wanted[0][:, -1])
    torch.testing.assert_close(mean, wanted[-1].mean(1))
    assert held(by_number, model, IDS) < NUMBER * (2 * first.numel() + wanted[1].numel()) + 1


@intervene
def over_prompts(model, prompts, look):
    found = []
    for ids in prompts:
        with model.trace(ids):
            found.append(model.layers[1].output.save())
    look()
    return torch.stack([each[0, -1] for each in found])


def test_entries_of_a_loop_over_prompts(either, streams) -> None:
    model = either[0]
    prompts = [IDS, IDS[:1, :3], IDS[:, 1:]]
    wanted = torch.stack([streams(ids)[1][0, -1] for ids in prompts])
    torch.testing.assert_close(over_prompts(model, prompts, int), wanted)
    assert held(over_prompts, model, prompts) == NUMBER * wanted.numel()


# --- what must be kept whole ---


@intervene
def later_positions(model, ids, positions, look):
    with model.trace(ids):
        acts = [layer.output for layer in model.layers]
    look()
    return [[each[:, position] for position in positions] for each in acts]


def test_positions_of_a_later_loop_keep_all(either, streams) -> None:
    model = either[0]
    found, wanted = later_positions(model, IDS, [0, 2], int), streams(IDS)
    assert torch.equal(found[1][1], wanted[1][:, 2])
    assert not narrowed(later_positions, model, IDS, [0, 2], int)
    assert "each element is kept whole: `position` is known only after it has been kept" in refused(
        later_positions, model, IDS, [0, 2], int
    )


@intervene
def changed(model, ids):
    with model.trace(ids):
        hidden = model.layers[1].output.save()
    part = hidden[:, -1]
    part += 1
    return hidden.sum(), hidden[:, -1]


@intervene
def changed_copies(model, ids):
    with model.trace(ids):
        hidden = model.layers[1].output.save()
    found = []
    for _ in range(2):
        mean = hidden.mean(1)
        mean += 1
        found.append(mean)
    return found


def test_what_is_written_to_stays_right(either, streams) -> None:
    model = either[0]
    wanted = streams(IDS)[1]
    for mean in changed_copies(model, IDS):
        torch.testing.assert_close(mean, wanted.mean(1) + 1)
    wanted[:, -1] += 1
    total, part = changed(model, IDS)
    torch.testing.assert_close(total, wanted.sum())
    assert torch.equal(part, wanted[:, -1])
    assert not narrowed(changed, model, IDS)


@intervene
def under_a_condition(model, ids, flag):
    with model.trace(ids):
        hidden = model.layers[1].output.save()
    if flag:
        return hidden[:, 30]
    return None


@intervene
def in_an_empty_loop(model, ids, rounds):
    with model.trace(ids):
        hidden = model.layers[1].output.save()
    return [hidden[:, 30] for _ in rounds]


def test_no_error_comes_where_none_came(either) -> None:
    model = either[0]
    assert under_a_condition(model, IDS, False) is None
    assert in_an_empty_loop(model, IDS, []) == []
    for experiment, given in ((under_a_condition, True), (in_an_empty_loop, [1])):
        with pytest.raises(IndexError):
            experiment(model, IDS, given)


@intervene
def steered(model, ids, vector):
    with model.trace(ids):
        model.layers[0].output += vector
        hidden = model.layers[1].output.save()
        streams = [layer.output for layer in model.layers]
    return hidden[:, -1].sum() + torch.stack([each.mean(1) for each in streams]).sum()


def test_gradients_flow_through_what_is_kept(either, hooked, streams) -> None:
    model, plain, path = either
    vector = torch.zeros(streams(IDS)[0].shape[-1], requires_grad=True)
    steered(model, IDS, vector).backward()
    found = vector.grad
    other = torch.zeros_like(vector, requires_grad=True)
    outs: list[torch.Tensor] = []

    def add(out: Any) -> Any:
        return out + other if isinstance(out, torch.Tensor) else (out[0] + other, *out[1:])

    def keep(out: Any) -> None:
        outs.append(out if isinstance(out, torch.Tensor) else out[0])

    layers = [(f"{path}.{number}", "output", keep) for number in range(len(model.layers))]
    hooked(plain, IDS, (f"{path}.0", "output", add), *layers, grad=True)
    (outs[1][:, -1].sum() + torch.stack([each.mean(1) for each in outs]).sum()).backward()
    torch.testing.assert_close(found, other.grad, rtol=1e-4, atol=1e-5)
    assert len(narrowed(steered, model, IDS, vector)) == 2
