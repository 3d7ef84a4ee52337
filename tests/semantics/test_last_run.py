"""What `last_run` says of a call, and what `measure` counts in it, against plain torch."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnsight_compiler import NNsight, intervene
from nnsight_compiler.runtime.meter import Meter
from tests.support.architectures import FAMILIES, random_model
from tests.support.chosen import some


class Toy(nn.Module):
    """Three layers of width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def toy() -> NNsight:
    return NNsight(Toy().eval())


@intervene
def read(net: Any, x: Any, layer: int) -> Any:
    with net.trace(x):
        return net.layers[layer].output


def test_a_call_says_what_ran_and_where_it_ended(toy: NNsight) -> None:
    @intervene
    def first(net: Any, x: Any) -> Any:
        with net.trace(x):
            return net.layers[0].output

    assert first.last_run is None
    first(toy, torch.ones(5, 4))
    [ran] = first.last_run.forwards
    assert (ran.rows, ran.tokens, ran.ended, ran.measured) == (5, None, None, None)
    first(toy, torch.ones(5, 4))
    [ran] = first.last_run.forwards
    assert ran.ended == ("layers.0", "output", 0)
    assert 0 < ran.seconds <= first.last_run.seconds
    assert first.last_run.peak is None


def test_a_call_that_fails_leaves_the_record_of_the_one_before(toy: NNsight) -> None:
    read(toy, torch.ones(2, 4), 1)
    before = read.last_run
    with pytest.raises(RuntimeError):
        read(toy, torch.ones(2, 5), 1)
    assert read.last_run is before
    read(toy, torch.ones(2, 4), 1)
    assert read.last_run is not before


def test_a_skipped_module_is_recorded(toy: NNsight) -> None:
    @intervene
    def around(net: Any, x: Any, skips: bool) -> Any:
        with net.trace(x):
            if skips:
                net.layers[1].skip(net.layers[0].output)
            return net.output

    around(toy, torch.ones(2, 4), True)
    assert [ran.skipped for ran in around.last_run.forwards] == [("layers.1",)]
    assert "1 module skipped" in str(around.explain(toy, torch.ones(2, 4), True))
    around(toy, torch.ones(2, 4), False)
    assert [ran.skipped for ran in around.last_run.forwards] == [()]


def test_what_another_experiment_runs_inside_is_part_of_the_run(toy: NNsight) -> None:
    @intervene
    def outer(net: Any, x: Any, inner: Any) -> Any:
        with net.trace(x):
            hidden = net.layers[0].output
        return inner(net, hidden, 2)

    outer(toy, torch.ones(2, 4), read)
    assert len(read.last_run.forwards) == 1
    assert len(outer.last_run.forwards) == 2


def test_threads_do_not_mix(toy: NNsight) -> None:
    read(toy, torch.ones(1, 4), 0)
    found: dict[int, Any] = {}
    together = threading.Barrier(4)

    def run(rows: int) -> None:
        nothing = read.last_run
        for _ in range(5):
            together.wait()
            read(toy, torch.ones(rows, 4), rows % 3)
            together.wait()
        found[rows] = nothing, [ran.rows for ran in read.last_run.forwards]

    threads = [threading.Thread(target=run, args=(rows,)) for rows in range(2, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {rows: (None, [rows]) for rows in range(2, 6)}
    assert [ran.rows for ran in read.last_run.forwards] == [1]


def test_the_record_keeps_no_tensor_alive(toy: NNsight) -> None:
    read(toy, torch.ones(2, 4), 1)  # what compiling leaves for the garbage collector is not meant here
    with Meter() as meter:
        x = torch.ones(2, 4) * 1
        read(toy, x, 1)
        del x
        assert meter.live == 0


def test_a_generation_is_one_run_of_so_many_steps() -> None:
    model = NNsight(random_model("gpt2", eos_token_id=None, bos_token_id=None))
    ids = torch.tensor([[5, 7, 11]])

    @intervene
    def generated(model: Any, ids: Any) -> Any:
        with model.generate(ids, max_new_tokens=3, do_sample=False) as tracer:
            out = tracer.result
        return out

    assert generated(model, ids).shape == (1, 6)
    [ran] = generated.last_run.forwards
    assert (ran.rows, ran.tokens, ran.steps) == (1, 3, 3)


@intervene(without="all")
def harvested(model: Any, ids: Any) -> Any:
    with model.trace(input_ids=ids):
        hidden = [layer.output for layer in model.layers]
    return hidden


@intervene(without="all")
def early(model: Any, ids: Any) -> Any:
    with model.trace(input_ids=ids):
        return model.layers[3].input[:, -1]


@intervene(without="all")
def whole(model: Any, ids: Any) -> Any:
    with model.trace(input_ids=ids):
        model.layers[1].input[:, 0] = 0
        logits = model.output.logits
    return logits


DEPTH = ("n_layer", "n_layers", "num_layers", "num_hidden_layers")


@pytest.mark.parametrize("kind", some(FAMILIES, "llama"))
def test_peaks_are_within_a_fifth_of_what_was_estimated(kind: str) -> None:
    options: dict[str, Any] = {name: 4 for name in DEPTH if name in FAMILIES[kind]}
    if kind == "gpt_neo":
        options["attention_types"] = [[["global", "local"], 2]]
    wrapped = random_model(kind, **options)
    model = NNsight(wrapped)
    for experiment in (harvested, early, whole):
        for ids in (torch.randint(3, 100, (2, 9)), torch.randint(3, 100, (5, 40))):
            experiment(model, ids)  # the first run of a shape does not stop early
            experiment.measure(model, ids)
            [stage] = experiment.explain(model, ids).stages
            [step] = [step for step in stage.variants[0].steps if step.kind == "forward"]
            expected, found = step.estimate, step.last_run
            assert (expected.rows, expected.tokens) == (found.rows, found.tokens) == tuple(ids.shape)
            assert (expected.layers, expected.modules) == (found.layers, found.modules)
            assert expected.peak == pytest.approx(found.peak, rel=0.2)
            assert expected.kept == pytest.approx(found.kept, rel=0.2)
            assert expected.flops == pytest.approx(found.flops, rel=0.02)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        wrapped(input_ids=ids)
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
