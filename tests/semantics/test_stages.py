"""Programs whose shape only a run can give. The oracle: the same Python, with torch hooks written by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, NNsight, intervene

LAYERS = 4
Writes = dict[int, Callable[[torch.Tensor], Any]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(LAYERS))
        self.head = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def made(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


torch.set_num_threads(1)
NET, OTHER = made(0), made(1)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
model = NNsight(NET)


def plain(writes: Writes | None = None, x: torch.Tensor = X, net: Net = NET) -> dict[Any, torch.Tensor]:
    """Every layer's output, and the result under "out", with writes to some layers."""
    seen: dict[Any, torch.Tensor] = {}
    handles = []
    for number, part in enumerate(net.layers):

        def hook(_part: Any, _args: Any, out: torch.Tensor, number: int = number) -> torch.Tensor:
            if writes and number in writes:
                out = writes[number](out.clone())
            seen[number] = out.clone()
            return out

        handles.append(part.register_forward_hook(hook))
    try:
        with torch.no_grad():
            seen["out"] = net(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


PLAIN = plain()


@pytest.fixture(autouse=True)
def _no_hooks_are_left() -> Iterator[None]:
    yield
    for net in (NET, OTHER):
        for module in net.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert "forward" not in vars(module)


# --- layers drawn at random ---


def test_a_layer_drawn_at_random() -> None:
    @intervene
    def run(model, x):
        layer = random.choice([0, 1, 3])
        with model.trace(x):
            h = model.layers[layer].output
        return layer, h

    random.seed(3)
    wanted = [random.choice([0, 1, 3]) for _ in range(6)]
    assert len(set(wanted)) > 1
    random.seed(3)
    for layer in wanted:
        found, h = run(model, X)
        assert found == layer
        assert torch.equal(h, PLAIN[layer])


def test_a_layer_drawn_inside_of_the_trace() -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            model.layers[random.randrange(3)].output *= 2
            out = model.output
        return out

    for seed in range(4):
        random.seed(seed)
        layer = random.randrange(3)
        random.seed(seed)
        assert torch.equal(run(model, X), plain({layer: lambda out: out * 2})["out"])


def test_draws_are_those_of_python_and_in_its_order() -> None:
    @intervene
    def run(model, x, count):
        random.seed(count)
        found = []
        for _ in range(count):
            layer = random.randint(0, 3)
            scale = random.random()
            with model.trace(x):
                model.layers[layer].output *= scale
                out = model.output
            found.append((layer, scale, out))
        return found, random.random()

    for count in (3, 5, 3):
        random.seed(count)
        wanted = [(random.randint(0, 3), random.random()) for _ in range(count)]
        after = random.random()
        found, last = run(model, X, count)
        assert [(layer, scale) for layer, scale, _ in found] == wanted
        assert last == after
        for layer, scale, out in found:
            assert torch.equal(out, plain({layer: lambda value, by=scale: value * by})["out"])


def test_a_layer_drawn_with_torch() -> None:
    @intervene
    def run(model, x):
        layer = torch.randint(0, 4, (1,)).item()
        noise = torch.randn(4)
        with model.trace(x):
            model.layers[layer].output += noise
            out = model.output
        return layer, out

    for seed in range(3):
        torch.manual_seed(seed)
        layer, noise = torch.randint(0, 4, (1,)).item(), torch.randn(4)
        torch.manual_seed(seed)
        found, out = run(model, X)
        assert found == layer
        assert torch.equal(out, plain({layer: lambda value, by=noise: value + by})["out"])


def test_a_block_drawn_at_random() -> None:
    @intervene
    def run(model, x):
        block = random.choice(list(model.layers))
        with model.trace(x):
            h = block.output
        return h

    for seed in range(4):
        random.seed(seed)
        layer = random.choice(range(LAYERS))
        random.seed(seed)
        assert torch.equal(run(model, X), PLAIN[layer])


def test_layers_shuffled_and_sampled() -> None:
    @intervene
    def run(model, x):
        order = list(range(4))
        random.shuffle(order)
        states = {}
        for layer in random.sample(order, 2):
            with model.trace(x):
                states[layer] = model.layers[layer].output
        return order, states

    for seed in range(3):
        random.seed(seed)
        order = list(range(4))
        random.shuffle(order)
        sample = random.sample(order, 2)
        random.seed(seed)
        found, states = run(model, X)
        assert found == order
        assert list(states) == sample
        assert all(torch.equal(states[layer], PLAIN[layer]) for layer in sample)


# --- layers from an earlier forward ---


def test_a_layer_from_the_values_of_an_earlier_forward() -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            layer = int(model.layers[0].output[0].argmax()) % 4
            logits = model.output
        with model.trace(x):
            model.layers[layer].output = 0
            changed = model.output
        return layer, (logits - changed).abs().max()

    seen = set()
    for scale in (1.0, -1.0, 3.0, -0.2):
        x = X * scale
        before = plain(x=x)
        layer = int(before[0][0].argmax()) % 4
        found, difference = run(model, x)
        assert found == layer
        assert torch.equal(difference, (before["out"] - plain({layer: torch.zero_}, x)["out"]).abs().max())
        seen.add(layer)
    assert len(seen) > 1


def test_the_layer_that_matters_most() -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            logits = model.output
        effects = []
        for layer in range(len(model.layers)):
            with model.trace(x):
                model.layers[layer].output = 0
                effects.append((model.output - logits).norm().item())
        best = max(range(len(effects)), key=lambda n: effects[n])
        with model.trace(x):
            model.layers[best].output *= 2
            out = model.output
        return best, out

    effects = [(plain({n: torch.zero_})["out"] - PLAIN["out"]).norm().item() for n in range(LAYERS)]
    best = max(range(LAYERS), key=lambda n: effects[n])
    found, out = run(model, X)
    assert found == best
    assert torch.equal(out, plain({best: lambda value: value * 2})["out"])


def test_each_forward_picks_the_layer_of_the_next() -> None:
    @intervene
    def walk(model, x, steps):
        layer, path = 0, []
        for _ in range(steps):
            path.append(layer)
            with model.trace(x):
                model.layers[layer].output += 1
                h = model.output
            layer = int(h[0].argmax()) % len(model.layers)
            x = x + h[:, :4] * 0.5
        return path, x

    for steps in (1, 5, 8):
        layer, path, x = 0, [], X
        for _ in range(steps):
            path.append(layer)
            h = plain({layer: lambda out: out + 1}, x)["out"]
            layer, x = int(h[0].argmax()) % LAYERS, x + h[:, :4] * 0.5
        found, last = walk(model, X, steps)
        assert found == path
        assert torch.equal(last, x)
        assert steps < 8 or len(set(path)) > 1


@pytest.mark.parametrize("kind", ["tensor", "item", "numpy", "bool"])
def test_kinds_of_numbers(kind: str) -> None:
    numpy = pytest.importorskip("numpy")
    makers = {"tensor": torch.tensor, "item": lambda n: torch.tensor(n).item(), "numpy": numpy.int64, "bool": bool}
    make = makers[kind]

    @intervene
    def run(model, x, number):
        layer = make(number)
        with model.trace(x):
            h = model.layers[layer].output
        return h

    for number in (0, 1, 3):
        assert torch.equal(run(model, X, number), PLAIN[int(make(number))])


# --- loops until something holds ---


def test_a_strength_is_doubled_until_the_answer_changes() -> None:
    @intervene
    def flip(model, x, vector):
        with model.trace(x):
            answer = model.output[0].argmax()
        strength = 0.25
        while True:
            with model.trace(x):
                model.layers[1].output += strength * vector
                now = model.output[0].argmax()
            if now != answer or strength > 1000:
                break
            strength *= 2
        return strength, answer, now

    vector = torch.tensor([1.0, -2.0, 0.5, 1.5])
    for x in (X, -X):
        answer, strength = plain(x=x)["out"][0].argmax(), 0.25
        while True:
            now = plain({1: lambda out, by=strength: out + by * vector}, x)["out"][0].argmax()
            if now != answer or strength > 1000:
                break
            strength *= 2
        assert [float(value) for value in flip(model, x, vector)] == [strength, float(answer), float(now)]


def test_a_while_whose_layer_moves() -> None:
    @intervene
    def search(model, x, bound):
        layer, norms = 0, []
        while layer < len(model.layers):
            with model.trace(x):
                norm = model.layers[layer].output.norm().item()
            norms.append(norm)
            if norm > bound:
                break
            layer += 1
        else:
            layer = -1
        return layer, norms

    norms = [PLAIN[n].norm().item() for n in range(LAYERS)]
    for bound in (0.0, sorted(norms)[1], sorted(norms)[2], 1e9):
        first = next((n for n, norm in enumerate(norms) if norm > bound), None)
        layer, found = search(model, X, bound)
        assert layer == (-1 if first is None else first)
        assert found == (norms if first is None else norms[: first + 1])


def test_a_while_that_jumps_between_layers() -> None:
    @intervene
    def run(model, x, layer):
        visited = []
        while layer not in visited and len(visited) < 6:
            visited.append(layer)
            with model.trace(x):
                h = model.layers[layer].output
            if h.mean() > 0:
                layer = (layer + 3) % 4
                continue
            layer = (layer + 1) % 4
        return visited

    for start in range(LAYERS):
        layer, visited = start, []
        while layer not in visited and len(visited) < 6:
            visited.append(layer)
            layer = (layer + 3) % 4 if PLAIN[layer].mean() > 0 else (layer + 1) % 4
        assert run(model, X, start) == visited


def test_breaking_out_of_a_loop_over_the_layers() -> None:
    @intervene
    def first_above(model, x, bound):
        found = None
        for number, block in enumerate(model.layers):
            with model.trace(x):
                norm = block.output.norm()
            if norm > bound:
                found = number
                break
        return found, norm

    norms = [PLAIN[n].norm() for n in range(LAYERS)]
    for bound in (0.0, float(sorted(norms)[1]), float(sorted(norms)[2]), 1e9):
        number = next((n for n, norm in enumerate(norms) if norm > bound), None)
        found, norm = first_above(model, X, bound)
        assert found == number
        assert torch.equal(norm, norms[-1 if number is None else number])


def test_an_early_return_on_the_value_of_a_forward() -> None:
    @intervene
    def run(model, x, bound):
        for layer in range(len(model.layers)):
            with model.trace(x):
                model.layers[layer].output = 0
                out = model.output
            if out.norm() > bound:
                return layer, out
        return None

    outs = [plain({n: torch.zero_})["out"] for n in range(LAYERS)]
    for bound in (0.0, float(sorted(out.norm() for out in outs)[-2]), 1e9):
        wanted = next(((n, out) for n, out in enumerate(outs) if out.norm() > bound), None)
        found = run(model, X, bound)
        if wanted is None:
            assert found is None
        else:
            assert found[0] == wanted[0]
            assert torch.equal(found[1], wanted[1])


def test_a_branch_around_a_trace_with_a_layer_of_its_own() -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
        best = int(h[0].argmax())
        if h.mean() > 0:
            with model.trace(x):
                model.layers[best].output = 0
                out = model.output
        else:
            with model.trace(x):
                out = model.layers[best].output
        return out

    seen = set()
    for x in (X, -X, X * 2 + 1, X - 2):
        h = plain(x=x)[0]
        best, positive = int(h[0].argmax()), bool(h.mean() > 0)
        seen.add(positive)
        wanted = plain({best: torch.zero_}, x)["out"] if positive else plain(x=x)[best]
        assert torch.equal(run(model, x), wanted)
    assert seen == {True, False}


# --- files ---


@pytest.mark.parametrize("kind", ["torch", "numpy", "safetensors"])
def test_a_vector_loaded_from_a_file(tmp_path: Any, kind: str) -> None:
    numpy, safetensors = pytest.importorskip("numpy"), pytest.importorskip("safetensors.torch")
    vector = torch.tensor([1.0, -2.0, 0.5, 3.0])

    @intervene
    def with_torch(model, x, path):
        vector = torch.load(path)
        with model.trace(x):
            model.layers[2].output[:] = vector
            out = model.output
        return out

    @intervene
    def with_numpy(model, x, path):
        vector = torch.from_numpy(numpy.load(path))
        with model.trace(x):
            model.layers[2].output[:] = vector
            out = model.output
        return out

    @intervene
    def with_safetensors(model, x, path):
        with model.trace(x):
            vector = safetensors.load_file(path)["vector"]
            model.layers[2].output[:] = vector
            out = model.output
        return out

    path = str(tmp_path / f"vector.{kind}.npy")
    run, write = {
        "torch": (with_torch, lambda value: torch.save(value, path)),
        "numpy": (with_numpy, lambda value: numpy.save(path, value.numpy())),
        "safetensors": (with_safetensors, lambda value: safetensors.save_file({"vector": value}, path)),
    }[kind]
    for scale in (1.0, 2.0):
        write(vector * scale)
        wanted = plain({2: lambda out, by=scale: (vector * by).expand(3, 4)})["out"]
        assert torch.equal(run(model, X, path), wanted)


def test_a_list_of_layers_read_from_a_file(tmp_path: Any) -> None:
    path = tmp_path / "layers.json"

    @intervene
    def run(model, x, path):
        with open(path) as file:
            chosen = json.load(file)["layers"]
        with model.trace(x):
            for layer in chosen:
                model.layers[layer].output *= 2
            states = [model.layers[layer].output for layer in chosen]
            out = model.output
        return states, out

    for chosen in ([0, 2], [3], [1, 0, 2], []):
        path.write_text(json.dumps({"layers": chosen}))
        want = plain({layer: lambda out: out * 2 for layer in chosen})
        states, out = run(model, X, str(path))
        assert torch.equal(out, want["out"])
        assert len(states) == len(chosen)
        assert all(torch.equal(state, want[layer]) for state, layer in zip(states, chosen, strict=True))


# --- effects: once, in order, and none at compile time ---


def test_a_host_function_is_called_once_for_each_call_and_never_to_compile() -> None:
    calls = []

    def choose(count: int) -> int:
        calls.append(count)
        return len(calls) % count

    @intervene
    def run(model, x):
        layer = choose(4)
        with model.trace(x):
            h = model.layers[layer].output
        return layer, h

    run.lower(model, X)
    run.compile(model, X)
    assert calls == []
    for number in range(1, 7):
        layer, h = run(model, X)
        assert layer == number % 4
        assert torch.equal(h, PLAIN[layer])
        assert calls == [4] * number


def test_stages_that_were_seen_before_are_not_compiled_again() -> None:
    @intervene
    def run(model, x, pick):
        layer = pick()
        with model.trace(x):
            h = model.layers[layer].output
        return h

    for layer in (0, 3):
        run(model, X, lambda layer=layer: layer)
    misses = run.cache_info().misses
    for layer in (0, 3, 3, 0):
        assert torch.equal(run(model, X, lambda layer=layer: layer), PLAIN[layer])
    assert run.cache_info().misses == misses


def test_effects_keep_their_order_across_stages() -> None:
    log: list[Any] = []

    def note(what: Any) -> Any:
        log.append(what)
        return what

    @intervene
    def run(model, x, layers):
        note("start")
        first = note(layers[0])
        with model.trace(x):
            note("first body")
            h = model.layers[first].output
            note(h.sum().item())
        log.append("between")
        second = note(int(h[0].argmax()))
        third = note(layers[1])
        with model.trace(x):
            log.append(model.layers[second].output.sum().item())
            model.layers[third].output = 0
            note(model.output.sum().item())
        note("end")
        return first, second

    for layers in ([0, 3], [2, 3], [0, 3]):
        log.clear()
        second = int(PLAIN[layers[0]][0].argmax())
        changed = plain({3: torch.zero_})
        assert run(model, X, layers) == (layers[0], second)
        assert log == [
            "start", layers[0], "first body", PLAIN[layers[0]].sum().item(), "between", second, 3,
            PLAIN[second].sum().item(), changed["out"].sum().item(), "end",
        ]  # fmt: skip


def test_an_effect_before_a_stage_that_fails_has_happened() -> None:
    log: list[str] = []

    def choose() -> int:
        log.append("chosen")
        return 99

    @intervene
    def run(model, x):
        log.append("before")
        layer = choose()
        with model.trace(x):
            h = model.layers[layer].output
        log.append("after")
        return h

    with pytest.raises((CompileError, IndexError), match="99"):
        run(model, X)
    assert log == ["before", "chosen"]


# --- state that changes between traces ---


class Sweep:
    """An experiment as a method, with its state on `self`."""

    def __init__(self) -> None:
        self.layer = 0
        self.scales = [1.0]
        self.seen: list[torch.Tensor] = []

    def advance(self) -> None:
        self.layer += 1
        self.scales.append(self.scales[-1] * 2)

    @intervene
    def run(self, model, x, steps):
        for _ in range(steps):
            with model.trace(x):
                model.layers[self.layer].output *= self.scales[-1]
                self.seen.append(model.output)
            self.advance()
        return self.layer

    @intervene
    def once(self, model, x):
        self.layer += 1
        with model.trace(x):
            h = model.layers[self.layer].output
        self.layer += 1
        with model.trace(x):
            later = model.layers[self.layer].output
        return h, later


def test_state_on_self_that_changes_between_traces() -> None:
    for steps in (2, 4, 2):
        sweep = Sweep()
        assert sweep.run(model, X, steps) == steps
        for number, out in enumerate(sweep.seen):
            assert torch.equal(out, plain({number: lambda value, by=2.0**number: value * by})["out"])
        assert len(sweep.seen) == steps


def test_state_on_self_that_the_experiment_assigns() -> None:
    for start in (0, 1, -1, 0):
        sweep = Sweep()
        sweep.layer = start
        first, second = sweep.once(model, X)
        assert torch.equal(first, PLAIN[start + 1])
        assert torch.equal(second, PLAIN[start + 2])


LAYER = 0
TABLE = {"layer": 0}


def step() -> None:
    global LAYER
    LAYER += 1
    TABLE["layer"] += 1


@pytest.mark.parametrize("kind", ["global", "own", "table", "item", "list", "method", "closure"])
def test_state_that_changes_before_it_names_a_layer(kind: str) -> None:
    global LAYER
    held = [0]
    chosen = 0

    def move() -> None:
        nonlocal chosen
        chosen += 1

    @intervene
    def by_global(model, x):
        step()
        with model.trace(x):
            h = model.layers[LAYER].output
        return h

    @intervene
    def by_own_global(model, x):
        global LAYER
        LAYER = LAYER + 1
        with model.trace(x):
            h = model.layers[LAYER].output
        return h

    @intervene
    def by_table(model, x):
        step()
        with model.trace(x):
            h = model.layers[TABLE["layer"]].output
        return h

    @intervene
    def by_item(model, x):
        TABLE["layer"] += 1
        with model.trace(x):
            h = model.layers[TABLE["layer"]].output
        return h

    @intervene
    def by_list(model, x):
        held.append(held[-1] + 1)
        with model.trace(x):
            h = model.layers[held[-1]].output
        return h

    @intervene
    def by_method(model, x):
        held.insert(0, held.pop() + 1)
        with model.trace(x):
            h = model.layers[held[0]].output
        return h

    @intervene
    def by_closure(model, x):
        move()
        with model.trace(x):
            h = model.layers[chosen].output
        return h

    runs = {
        "global": by_global, "own": by_own_global, "table": by_table, "item": by_item, "list": by_list,
        "method": by_method, "closure": by_closure,
    }  # fmt: skip
    LAYER = TABLE["layer"] = 0
    for number in (1, 2, 3):
        assert torch.equal(runs[kind](model, X), PLAIN[number]), number


@pytest.mark.parametrize("kind", ["global", "own", "table", "list", "attribute"])
def test_state_that_changes_before_it_decides_about_a_write(kind: str) -> None:
    global LAYER

    class State:
        on = 0

    state, held = State(), []

    @intervene
    def by_global(model, x):
        step()
        with model.trace(x):
            if LAYER:
                model.layers[1].output = 0
            out = model.output
        return out

    @intervene
    def by_own_global(model, x):
        global LAYER
        LAYER = LAYER + 1
        with model.trace(x):
            if LAYER:
                model.layers[1].output = 0
            out = model.output
        return out

    @intervene
    def by_table(model, x):
        TABLE["layer"] = 1
        with model.trace(x):
            if TABLE["layer"]:
                model.layers[1].output = 0
            out = model.output
        return out

    @intervene
    def by_list(model, x):
        held.append(1)
        with model.trace(x):
            if len(held) > 0:
                model.layers[1].output = 0
            out = model.output
        return out

    @intervene
    def by_attribute(model, x):
        state.on = 1
        with model.trace(x):
            if state.on:
                model.layers[1].output = 0
            out = model.output
        return out

    runs = {
        "global": by_global, "own": by_own_global, "table": by_table, "list": by_list, "attribute": by_attribute,
    }  # fmt: skip
    LAYER = TABLE["layer"] = 0
    assert torch.equal(runs[kind](model, X), plain({1: torch.zero_})["out"])


def test_state_changed_in_a_body_and_used_in_the_next() -> None:
    class Cursor:
        layer = 0

    cursor = Cursor()

    @intervene
    def run(model, x):
        states = []
        for _ in range(3):
            with model.trace(x):
                states.append(model.layers[cursor.layer].output)
                cursor.layer += 1
        return states

    states = run(model, X)
    assert cursor.layer == 3
    assert all(torch.equal(state, PLAIN[number]) for number, state in enumerate(states))


def test_a_list_of_layers_that_grows_while_it_is_used() -> None:
    @intervene
    def run(model, x, queue):
        states = []
        while queue:
            layer = queue.pop(0)
            with model.trace(x):
                h = model.layers[layer].output
            states.append(h)
            if h.mean() > 0 and layer + 1 < 4 and len(states) < 5:
                queue.append(layer + 1)
        return states

    for start in ([0], [2, 0], [3, 3]):
        queue, wanted = list(start), []
        while queue:
            layer = queue.pop(0)
            wanted.append(layer)
            if PLAIN[layer].mean() > 0 and layer + 1 < 4 and len(wanted) < 5:
                queue.append(layer + 1)
        given = list(start)
        states = run(model, X, given)
        assert given == []
        assert len(states) == len(wanted)
        assert all(torch.equal(state, PLAIN[layer]) for state, layer in zip(states, wanted, strict=True))


def test_a_dictionary_look_up() -> None:
    @intervene
    def run(model, x, names):
        by_token = {0: "early", 1: "middle", 2: "late", 3: "late"}
        with model.trace(x):
            token = model.layers[0].output[0].argmax().item()
        name = by_token[token]
        with model.trace(x):
            h = model.layers[names[name]].output
        return name, h

    names = {"early": 0, "middle": 1, "late": 3}
    for x in (X, -X, X + 1):
        token = int(plain(x=x)[0][0].argmax())
        name = {0: "early", 1: "middle", 2: "late", 3: "late"}[token]
        found, h = run(model, x, names)
        assert found == name
        assert torch.equal(h, plain(x=x)[names[name]])


# --- functions, comprehensions, try ---


def read(model: Any, x: torch.Tensor, layer: int) -> torch.Tensor:
    with model.trace(x):
        h = model.layers[layer].output
    return h


def test_a_helper_that_traces_with_a_layer_of_the_run() -> None:
    @intervene
    def run(model, x):
        layer = int(read(model, x, 0)[0].argmax())
        return layer, read(model, x, layer), read(model, x, random.choice([1, 2]))

    random.seed(0)
    drawn = random.choice([1, 2])
    random.seed(0)
    layer, h, other = run(model, X)
    assert layer == int(PLAIN[0][0].argmax())
    assert torch.equal(h, PLAIN[layer])
    assert torch.equal(other, PLAIN[drawn])


def test_a_nested_function_that_traces_with_a_layer_of_the_run() -> None:
    @intervene
    def run(model, x, scale):
        count = 0

        def scaled(layer):
            nonlocal count
            count += 1
            with model.trace(x):
                model.layers[layer].output *= scale
                out = model.output
            return out

        first = scaled(random.randrange(4))
        second = scaled(int(first[0].argmax()) % 4)
        return first, second, count

    random.seed(2)
    layer = random.randrange(4)
    random.seed(2)
    first, second, count = run(model, X, 0.5)
    assert count == 2
    assert torch.equal(first, plain({layer: lambda out: out * 0.5})["out"])
    layer = int(first[0].argmax()) % 4
    assert torch.equal(second, plain({layer: lambda out: out * 0.5})["out"])


def test_comprehensions_and_generators_with_layers_of_the_run() -> None:
    @intervene
    def run(model, x):
        chosen = sorted(random.sample(range(4), 2))
        states = [read(model, x, layer) for layer in chosen]
        sums = {layer: read(model, x, layer).sum().item() for layer in chosen if layer % 2}
        total = sum(read(model, x, layer).mean().item() for layer in chosen)
        with model.trace(x):
            inside = [model.layers[layer].output[0] for layer in chosen]
        return chosen, states, sums, total, inside

    for seed in range(3):
        random.seed(seed)
        layers = sorted(random.sample(range(4), 2))
        random.seed(seed)
        chosen, states, sums, total, inside = run(model, X)
        assert chosen == layers
        assert all(torch.equal(state, PLAIN[layer]) for state, layer in zip(states, layers, strict=True))
        assert sums == {layer: PLAIN[layer].sum().item() for layer in layers if layer % 2}
        assert total == sum(PLAIN[layer].mean().item() for layer in layers)
        assert all(torch.equal(state, PLAIN[layer][0]) for state, layer in zip(inside, layers, strict=True))


def test_try_around_a_trace_with_a_layer_of_the_run() -> None:
    log: list[str] = []

    @intervene
    def run(model, x, choices):
        results = []
        for _ in range(3):
            try:
                layer = choices.pop()
                with model.trace(x):
                    h = model.layers[layer].output
                results.append(h.sum().item() / (layer - 1))
            except ZeroDivisionError:
                log.append("divided")
                results.append(None)
            except IndexError:
                log.append("empty")
                break
            else:
                log.append("fine")
            finally:
                log.append("finally")
        return results

    sums = [PLAIN[n].sum().item() for n in range(LAYERS)]
    assert run(model, X, [3, 1]) == [None, sums[3] / 2]
    assert log == ["divided", "finally", "fine", "finally", "empty", "finally"]
    log.clear()
    assert run(model, X, [0, 2, 2, 3]) == [sums[3] / 2, sums[2] / 1, sums[2] / 1]
    assert log == ["fine", "finally"] * 3


def test_an_exception_in_the_body_of_a_trace_with_a_layer_of_the_run() -> None:
    @intervene
    def run(model, x, bound):
        layer = random.randrange(4)
        with model.trace(x):
            h = model.layers[layer].output
            if h.norm() > bound:
                raise ValueError(f"layer {layer}")
        return h

    random.seed(4)
    layer = random.randrange(4)
    random.seed(4)
    with pytest.raises(ValueError, match=f"layer {layer}"):
        run(model, X, 0)
    random.seed(4)
    assert torch.equal(run(model, X, 1e9), PLAIN[layer])


def test_a_value_kept_for_a_later_trace() -> None:
    @intervene
    def run(model, x, other):
        kept = {}
        for layer in random.sample(range(4), 2):
            with model.trace(other):
                kept[layer] = model.layers[layer].output
        outs = []
        for layer, value in kept.items():
            with model.trace(x):
                model.layers[layer].output = value
                outs.append(model.output)
        return list(kept), outs

    other = X.flip(0) * 2
    random.seed(1)
    layers = random.sample(range(4), 2)
    random.seed(1)
    found, outs = run(model, X, other)
    assert found == layers
    source = plain(x=other)
    for layer, out in zip(layers, outs, strict=True):
        assert torch.equal(out, plain({layer: lambda _, value=source[layer]: value})["out"])


def test_two_models() -> None:
    second = NNsight(OTHER)

    @intervene
    def run(model, other, x):
        with model.trace(x):
            layer = int(model.layers[1].output[0].argmax())
        with other.trace(x):
            h = other.layers[layer].output
            answer = int(other.output[0].argmax()) % 4
        with model.trace(x):
            model.layers[answer].output = h
            out = model.output
        return layer, answer, out

    for first, then, net, other in ((model, second, NET, OTHER), (second, model, OTHER, NET)):
        layer = int(plain(net=net)[1][0].argmax())
        states = plain(net=other)
        answer = int(states["out"][0].argmax()) % 4
        found = run(first, then, X)
        assert found[:2] == (layer, answer)
        assert torch.equal(found[2], plain({answer: lambda _, value=states[layer]: value}, net=net)["out"])


def test_a_model_drawn_at_random() -> None:
    models = [model, NNsight(OTHER)]

    @intervene
    def run(models, x):
        chosen = random.choice(models)
        with chosen.trace(x):
            out = chosen.output
        return out

    for seed in range(4):
        random.seed(seed)
        net = random.choice([NET, OTHER])
        random.seed(seed)
        assert torch.equal(run(models, X), plain(net=net)["out"])


# --- what no stage can give ---


def test_a_module_chosen_by_a_value_of_the_same_forward() -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            layer = int(model.layers[0].output[0].argmax())
            h = model.layers[layer].output
        return h

    with pytest.raises(CompileError, match=r"must be known before") as found:
        run(model, X)
    text = str(found.value)
    start = run.__wrapped__.__code__.co_firstlineno
    for line in (start + 3, start + 4):  # where it is made, and where it is needed
        assert f"test_stages.py:{line}:" in text
    assert "way out" in text


def test_a_loop_over_layers_up_to_a_value_of_the_same_forward() -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            count = int(model.layers[0].output[0].argmax())
            for layer in range(count):
                model.layers[layer + 1].output = 0
            out = model.output
        return out

    with pytest.raises(CompileError, match=r"must be known before|not known before"):
        run(model, X)
