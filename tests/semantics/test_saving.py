"""D3: what is saved is the value at that line; and Python around it stays Python (D4, D5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from tqdm import tqdm

from nnsight_compiler import ExperimentError, UnsavedValueError, intervene, save


@pytest.fixture
def hidden(plain_gpt2, clean, grab) -> list[torch.Tensor]:
    """What each layer returns."""
    return [grab(plain_gpt2, clean, f"transformer.h.{index}") for index in range(4)]


def same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for value, other in zip(found, expected, strict=True):
        assert_close(value, other)


def test_a_save_before_a_write_of_ours(model, clean, hidden) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            h = model.layers[1].output
            before = h.save()
            part = h[:, 0].save()
            marked = save(h[:, 1:])
            h[:] = 0
            after = model.layers[1].output.save()
        return before, part, marked, after

    plain = hidden[1]
    same(experiment(model, clean), (plain, plain[:, 0], plain[:, 1:], torch.zeros_like(plain)))


def test_a_save_before_a_write_of_the_model_s(stack, plain_stack, batch, hooked) -> None:
    @intervene
    def experiment(model, x):
        with model.trace(x):
            whole = model.blocks[0].linear.output.save()
            part = model.blocks[1].linear.output[:, -1].save()
            into = model.blocks[2].act.input.save()
        return whole, part, into

    held: dict[str, torch.Tensor] = {}

    def note(name):
        return lambda value: held.update({name: value.clone()})

    hooked(
        plain_stack,
        batch,
        *((f"blocks.{n}.linear", "output", note(n)) for n in (0, 1)),
        ("blocks.2.act", "input", note(2)),
    )
    assert all((value < 0).any() for value in held.values())
    same(experiment(stack, batch), (held[0], held[1][:, -1], held[2]))


def test_a_saved_slice_does_not_keep_its_base(model, clean) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            part = model.layers[1].output[:, -1].save()
            logits = model.lm_head.output[0, -1, :3]
            made = (model.layers[2].output * 2)[:, 0].save()
            listed = [layer.output[0, 0, :2] for layer in model.layers]
        return part, logits, made, listed

    part, logits, made, listed = experiment(model, clean)
    for value in (part, logits, made, *listed):
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_a_saved_slice_of_what_the_program_made_itself(model, clean) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            made = model.layers[2].output @ torch.ones(32, 500)
            return made[:, 0].save()

    value = experiment(model, clean)
    assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_a_save_is_written_and_not_what_was_saved(model, clean) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            made = torch.zeros(1, 6, 32)
            kept = made.save()
            marked = save(made)
            marked[:, 1] += 0.5
            model.layers[1].output = marked
            return made, kept, marked, model.lm_head.output

    made, kept, marked, _ = experiment(model, clean)
    assert torch.equal(made, torch.zeros(1, 6, 32))
    assert torch.equal(kept, made)
    assert (marked[:, 1] == 0.5).all()


def test_saves_in_a_loop_of_writes(model, clean, hidden) -> None:
    @intervene
    def experiment(model, prompt):
        kept = []
        with model.trace(prompt):
            h = model.layers[1].output
            for number in range(3):
                h += number
                kept.append(h.save())
        return kept

    same(experiment(model, clean), [hidden[1], hidden[1] + 1, hidden[1] + 3])


def test_what_is_put_into_a_container_is_the_value_then(model, clean, hidden) -> None:
    @intervene
    def experiment(model, prompt):
        listed, mapped = [], {}
        with model.trace(prompt):
            h = model.layers[1].output
            listed.append(h)
            mapped["before"] = h
            inside = [h]
            h[:] = 1
            listed.append(h)
            mapped["after"] = h
            inside.append(h)
        return listed, mapped, inside

    listed, mapped, _ = experiment(model, clean)
    ones = torch.ones_like(hidden[1])
    same(listed, (hidden[1], ones))
    same((mapped["before"], mapped["after"]), (hidden[1], ones))


def test_containers_of_every_kind(model, clean, hidden) -> None:
    @intervene
    def experiment(model, prompt):
        outer = {"layers": []}
        with model.trace(prompt):
            for index, layer in enumerate(model.layers):
                outer["layers"].append((index, {"norm": layer.output.norm(), "last": layer.output[:, -1]}))
            outer["count"] = len(outer["layers"])
        outer["sum"] = sum(entry["norm"] for _, entry in outer["layers"])
        return outer

    outer = experiment(model, clean)
    assert outer["count"] == 4
    for (index, entry), value, number in zip(outer["layers"], hidden, range(4), strict=True):
        assert index == number
        assert_close(entry["norm"], value.norm())
        assert_close(entry["last"], value[:, -1])
    assert_close(outer["sum"], sum(value.norm() for value in hidden))


def test_containers_from_outside_are_filled(model, clean, hidden) -> None:
    outside: list[torch.Tensor] = []

    class Holder:
        kept: Any = None

    holder = Holder()

    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            h = model.layers[1].output
            outside.append(h)
            holder.kept = h[:, 0]
            h[:] = 0
            return h

    result = experiment(model, clean)
    assert_close(result, torch.zeros_like(hidden[1]))
    assert_close(outside[0], hidden[1])
    assert_close(holder.kept, hidden[1][:, 0])


# --- loops ---


def test_loops_over_layers(model, clean, hidden) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            plain = [layer.output for layer in model.layers]
            numbered = [(n, layer.output.mean()) for n, layer in enumerate(model.layers, start=1)]
            by_index = [model.layers[n].output for n in range(len(model.layers))]
            backwards = [layer.output for layer in reversed(model.layers)]
            sliced = [layer.output for layer in model.layers[1:-1]]
            paired = [a.output - b.output for a, b in zip(model.layers[1:], model.layers, strict=False)]
            mapping = {f"layer {n}": layer.output for n, layer in enumerate(model.layers) if n % 2}
            shown = [layer.output for layer in tqdm(model.layers, disable=True)]
            total = sum(layer.output.norm() for layer in model.layers)
            largest = max(layer.output.norm().item() for layer in model.layers)
            nested = [[layer.output[:, p] for p in range(2)] for layer in model.layers[:2]]
            last = model.layers[-1].output
        return plain, numbered, by_index, backwards, sliced, paired, mapping, shown, total, largest, nested, last

    found = experiment(model, clean)
    plain, numbered, by_index, backwards, sliced, paired, mapping, shown, total, largest, nested, last = found
    same(plain, hidden)
    assert [n for n, _ in numbered] == [1, 2, 3, 4]
    same([value for _, value in numbered], [value.mean() for value in hidden])
    same(by_index, hidden)
    same(backwards, hidden[::-1])
    same(sliced, hidden[1:-1])
    same(paired, [a - b for a, b in zip(hidden[1:], hidden, strict=False)])
    assert list(mapping) == ["layer 1", "layer 3"]
    same(mapping.values(), (hidden[1], hidden[3]))
    same(shown, hidden)
    assert_close(total, sum(value.norm() for value in hidden))
    assert largest == pytest.approx(max(value.norm().item() for value in hidden))
    for row, value in zip(nested, hidden[:2], strict=True):
        same(row, [value[:, 0], value[:, 1]])
    assert_close(last, hidden[3])


def test_a_loop_over_positions_is_kept(model, plain_gpt2, clean, grab, hidden) -> None:
    @intervene
    def experiment(model, prompt, positions):
        kept = []
        with model.trace(prompt):
            h = model.layers[1].output
            for p in range(positions):
                kept.append(h[:, p] * p)
                h[:, p] = p
            return kept, model.lm_head.output

    for positions in (2, 5):
        kept, logits = experiment(model, clean, positions)
        same(kept, [hidden[1][:, p] * p for p in range(positions)])

        def change(x, positions=positions):
            for p in range(positions):
                x[:, p] = p

        assert_close(logits, grab(plain_gpt2, clean, "lm_head", "output", ("transformer.h.1", "output", change)))
    assert experiment.cache_info().size == 1
    text = str(experiment.lower(model, clean, 3))
    assert "for " in text


def test_nested_loops_over_layers_and_positions_and_prompts(model, plain_gpt2, clean, corrupt, grab) -> None:
    @intervene
    def sweep(model, clean, corrupt):
        rows = []
        for layer in range(len(model.layers)):
            row = []
            for position in range(clean.shape[1]):
                with model.trace(clean):
                    source = model.layers[layer].output[:, position]
                with model.trace(corrupt):
                    model.layers[layer].output[:, position] = source
                    row.append(model.lm_head.output[0, -1, 7])
            rows.append(torch.stack(row))
        return torch.stack(rows)

    expected = torch.empty(4, 6)
    for layer in range(4):
        for position in range(6):
            source = grab(plain_gpt2, clean, f"transformer.h.{layer}")[:, position]

            def write(x, source=source, position=position):
                x[:, position] = source

            hook = (f"transformer.h.{layer}", "output", write)
            expected[layer, position] = grab(plain_gpt2, corrupt, "lm_head", "output", hook)[0, -1, 7]
    assert_close(sweep(model, clean, corrupt), expected)


def test_while_loops(model, plain_gpt2, clean, grab, hidden) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            index = 0
            found = []
            while index < len(model.layers):
                found.append(model.layers[index].output)
                index += 2
            h = model.layers[1].output
            rounds = 0
            while h.norm() > 1:
                h /= 2
                rounds += 1
            return found, rounds, h

    found, rounds, h = experiment(model, clean)
    value, count = hidden[1].clone(), 0
    while value.norm() > 1:
        value /= 2
        count += 1
    halved = ("transformer.h.1", "output", lambda x: value)
    same(found, (hidden[0], grab(plain_gpt2, clean, "transformer.h.2", "output", halved)))
    assert rounds == count
    assert_close(h, value)


def test_conditions_on_the_loop_variable(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt, chosen):
        kept = {}
        with model.trace(prompt):
            for n, layer in enumerate(model.layers):
                if n == chosen:
                    layer.output[:, -1] = 0
                elif n > chosen:
                    kept[n] = layer.output
                else:
                    continue
                if n == 2:
                    break
        return kept

    def zero(x):
        x[:, -1] = 0

    kept = experiment(model, clean, 1)
    assert list(kept) == [2]
    assert_close(kept[2], grab(plain_gpt2, clean, "transformer.h.2", "output", ("transformer.h.1", "output", zero)))
    kept = experiment(model, clean, 0)
    assert list(kept) == [1, 2]


def test_a_condition_on_a_live_value_inside_a_loop_over_layers(model, clean, hidden) -> None:
    @intervene
    def experiment(model, prompt, bound):
        found = []
        with model.trace(prompt):
            for n, layer in enumerate(model.layers):
                norm = layer.output.norm()
                if norm > bound:
                    found.append((n, norm))
        return found

    norms = [value.norm() for value in hidden]
    bound = sorted(value.item() for value in norms)[1] + 1e-4
    found = experiment(model, clean, bound)
    assert [n for n, _ in found] == [n for n, value in enumerate(norms) if value > bound]
    same([value for _, value in found], [value for value in norms if value > bound])


def test_a_running_sum_over_layers(model, clean, hidden) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            total = 0
            best = None
            for layer in model.layers:
                total = total + layer.output
                if best is None or layer.output.norm() > best.norm():
                    best = layer.output
            total += 1
        return total, best

    total, best = experiment(model, clean)
    assert_close(total, sum(hidden) + 1)
    assert_close(best, max(hidden, key=lambda value: value.norm()))


def test_an_in_place_sum_that_begins_as_a_layer_s_value(model, plain_gpt2, clean, grab) -> None:
    """`total` is the live tensor of layer 0: adding what a later layer gives would change the past."""

    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            total = model.layers[0].output
            total += model.layers[1].output
            return total, model.lm_head.output

    with pytest.raises(ExperimentError, match="later"):
        experiment(model, clean)


# --- functions ---


def scaled(value, by=2):
    return value * by


def zero_last(layer):
    layer.output[:, -1] = 0
    return layer.output


def norms(layers):
    if not layers:
        return []
    return [layers[0].output.norm(), *norms(layers[1:])]


class Lens:
    def __init__(self, model: Any, factor: float) -> None:
        self.model, self.factor = model, factor

    def of(self, layer):
        return layer.output * self.factor

    @intervene
    def run(self, prompt):
        with self.model.trace(prompt):
            return [self.of(layer) for layer in self.model.layers]


def test_helper_functions(model, plain_gpt2, clean, grab, hidden) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            plain = scaled(model.layers[0].output)
            named = scaled(by=3, value=model.layers[0].output)
            written = zero_last(model.layers[1])
            later = model.layers[2].output
        return plain, named, written, later

    def zero(x):
        x[:, -1] = 0

    hook = ("transformer.h.1", "output", zero)
    plain, named, written, later = experiment(model, clean)
    assert_close(plain, hidden[0] * 2)
    assert_close(named, hidden[0] * 3)
    assert_close(written, grab(plain_gpt2, clean, "transformer.h.1", "output", hook))
    assert_close(later, grab(plain_gpt2, clean, "transformer.h.2", "output", hook))


def test_recursion_over_layers(model, clean, hidden) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            return norms(model.layers[:])

    same(experiment(model, clean), [value.norm() for value in hidden])


def test_methods(model, clean, hidden) -> None:
    same(Lens(model, 1.5).run(clean), [value * 1.5 for value in hidden])
    same(Lens(model, 2.0).run(clean), [value * 2 for value in hidden])


def test_closures_and_lambdas(model, plain_gpt2, clean, grab, hidden) -> None:
    factor = 3.0

    @intervene
    def experiment(model, prompt):
        def at(n, scale=1.0):
            return model.layers[n].output * scale * factor

        twice = lambda value: value * 2  # noqa: E731
        with model.trace(prompt):
            first = at(0)
            second = twice(at(1, scale=2.0))
            count = 0

            def write(n):
                nonlocal count
                count += 1
                model.layers[n].output[:, 0] = count

            write(2)
            write(3)
            late = model.layers[3].output
        return first, second, late, count

    first, second, late, count = experiment(model, clean)
    assert_close(first, hidden[0] * 3)
    assert_close(second, hidden[1] * 12)

    def change(value):
        def write(x):
            x[:, 0] = value

        return write

    hooks = [(f"transformer.h.{n}", "output", change(n - 1)) for n in (2, 3)]
    assert_close(late, grab(plain_gpt2, clean, "transformer.h.3", "output", *hooks))
    assert count == 2
    factor = 1.0
    assert_close(experiment(model, clean)[0], hidden[0])


def test_code_before_between_and_after(model, clean, corrupt, hidden, plain_gpt2, grab) -> None:
    @intervene
    def experiment(model, clean, corrupt, deep):
        layer = 3 if deep else 0
        scale = [1, 2, 3][layer % 3]
        with model.trace(clean):
            a = model.layers[layer].output
        a = a * scale
        text = f"{layer}:{scale}"
        if deep:
            with model.trace(corrupt):
                b = model.layers[layer].output
            result = a - b
        else:
            result = a
        return text, result

    text, result = experiment(model, clean, corrupt, False)
    assert text == "0:1"
    assert_close(result, hidden[0])
    text, result = experiment(model, clean, corrupt, True)
    assert text == "3:1"
    assert_close(result, hidden[3] - grab(plain_gpt2, corrupt, "transformer.h.3"))


# --- undecorated blocks ---


def test_an_undecorated_block(model, plain_gpt2, clean, grab, hidden) -> None:
    with model.trace(clean):
        late = model.layers[3].output.save()
        early = model.layers[0].output
        before = early.save()
        early[:, 0] = 0
        lost = model.layers[2].output

    def zero(x):
        x[:, 0] = 0

    assert_close(before, hidden[0])
    assert_close(late, grab(plain_gpt2, clean, "transformer.h.3", "output", ("transformer.h.0", "output", zero)))
    with pytest.raises(UnsavedValueError, match="lost"):
        lost + 1


def test_an_undecorated_block_with_a_saved_list(model, clean, hidden) -> None:
    scale = 2
    with model.trace(clean):
        found = list().save()
        for layer in model.layers:
            found.append(layer.output * scale)
        number = len(found)

    assert number == 4
    same(found, [value * 2 for value in hidden])
