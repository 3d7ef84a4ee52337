"""Which models are taken to be alike, so that what is found out about one serves the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import random_model
from torch import nn

from nnsight_compiler import NNsight, intervene, observations
from nnsight_compiler.runtime.likeness import Alike, UnlikeAnyError, likeness_of_module


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.scale: Any = 1.0
        self.first = nn.Linear(4, 4)
        self.second = self.first if tied else nn.Linear(4, 4)
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) * self.scale + self.shift


def changed(change: Callable[[Net], object]) -> Net:
    net = Net()
    change(net)
    return net


def one_bias(net: Net) -> None:
    net.second.bias = net.first.bias


UNLIKE = {
    "a number": changed(lambda net: setattr(net, "scale", 2.0)),
    "a number of another type": changed(lambda net: setattr(net, "scale", 1)),
    "a mode": Net().eval(),
    "a dtype": Net().half(),
    "a shape": changed(lambda net: setattr(net, "second", nn.Linear(4, 4, bias=False))),
    "a class": changed(lambda net: setattr(net, "second", nn.Bilinear(4, 4, 4))),
    "a module under two names": Net(tied=True),
    "a parameter under two names": changed(one_bias),
    "a parameter that is frozen": changed(lambda net: net.first.requires_grad_(False)),
    "a forward of its own": changed(lambda net: setattr(net, "forward", lambda x: x)),
    "no buffer": changed(lambda net: net.register_buffer("shift", None)),
}


def test_models_of_one_make_are_equal() -> None:
    assert likeness_of_module(Net()) == likeness_of_module(Net())
    assert likeness_of_module(random_model("gpt2")) == likeness_of_module(random_model("gpt2"))
    assert likeness_of_module(random_model("llama")) == likeness_of_module(random_model("llama"))


@pytest.mark.parametrize("difference", UNLIKE)
def test_models_that_differ_are_not(difference: str) -> None:
    assert likeness_of_module(UNLIKE[difference]) != likeness_of_module(Net())


def test_configurations_count() -> None:
    one, other = random_model("gpt2"), random_model("gpt2", layer_norm_epsilon=0.5)
    assert likeness_of_module(one) != likeness_of_module(other)


def test_a_model_with_an_object_that_is_not_known_is_equal_to_none() -> None:
    with pytest.raises(UnlikeAnyError, match="object"):
        likeness_of_module(changed(lambda net: setattr(net, "scale", object())))


def test_one_that_keeps_other_things_alive_is_like_none() -> None:
    kept = torch.ones(3)
    with pytest.raises(UnlikeAnyError, match="function"):
        likeness_of_module(changed(lambda net: setattr(net, "scale", lambda: kept)))
    with pytest.raises(UnlikeAnyError, match="builtin"):
        likeness_of_module(changed(lambda net: setattr(net, "scale", kept.add)))


def test_code_that_was_exchanged_counts() -> None:
    class Other(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    before = likeness_of_module(Other())
    Other.forward = Net.forward  # type: ignore[method-assign]
    assert likeness_of_module(Other()) != before


def test_a_question_is_asked_once_of_modules_that_are_alike() -> None:
    asked: list[Net] = []
    alike: Alike[int] = Alike()

    def ask(net: Net, question: str, lasting: bool = True) -> int:
        def answer() -> int:
            asked.append(net)
            return len(asked)

        return alike.find(net, question, answer, lambda _: lasting)

    assert ask(Net(), "first", lasting=False) == 1
    assert [ask(Net(), "first"), ask(Net(), "first"), ask(Net(), "second")] == [2, 2, 3]
    assert ask(UNLIKE["a mode"], "first") == 4
    strange = changed(lambda net: setattr(net, "scale", object()))
    assert [ask(strange, "first"), ask(strange, "first")] == [5, 6]


def test_the_answer_that_was_not_asked_for_longest_gives_way() -> None:
    alike: Alike[int] = Alike()
    answers = iter(range(1, 1000))
    for question in range(Alike.MOST):
        alike.find(Net(), question, lambda: next(answers))
    assert alike.find(Net(), 0, lambda: next(answers)) == 1
    assert alike.find(Net(), Alike.MOST, lambda: next(answers)) == Alike.MOST + 1
    assert alike.find(Net(), 0, lambda: next(answers)) == 1
    assert alike.find(Net(), 1, lambda: next(answers)) == Alike.MOST + 2


def test_models_that_are_alike_are_observed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second compiles to the same program without a run of either model on stand-ins."""
    runs: list[str] = []
    for name in ("observe", "infer_axes"):
        plain = getattr(observations, name)

        def counted(*args: Any, name: str = name, plain: Any = plain, **options: Any) -> Any:
            runs.append(name)
            return plain(*args, **options)

        monkeypatch.setattr(observations, name, counted)

    @intervene
    def experiment(model: Any, x: Any) -> Any:
        with model.trace(x):
            model.first.output[:, 0] = 0
            result = model.second.output
        return result

    def net() -> Net:
        return changed(lambda net: setattr(net, "scale", 0.1875))  # like no other test's

    one, other, third = net(), net(), net().half()
    x = torch.randn(2, 4)
    given = experiment(NNsight(one), x)
    assert sorted(runs) == ["infer_axes", "observe"]
    assert not torch.equal(given, experiment(NNsight(other), x))
    expected = other.first(x)
    expected[:, 0] = 0
    assert torch.equal(experiment(NNsight(other), x), other.second(expected))
    assert sorted(runs) == ["infer_axes", "observe"]
    assert experiment(NNsight(third), x.half()).dtype == torch.half
    assert sorted(runs) == ["infer_axes", "infer_axes", "observe", "observe"]
