"""What a job had changed before it raised, against a run here: an error takes it along, as far as it fits."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from executing_service import executing_service
from torch import nn

from nnsight_compiler import LanguageModel, NNsight, intervene
from nnsight_compiler.remote.errors import MOST_CHANGED, error_record, left, raise_from
from nnsight_compiler.remote.refusals import failure

ROWS = torch.linspace(-1, 1, 32).reshape(8, 4)
PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def net() -> NNsight:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))


class Log:
    def __init__(self) -> None:
        self.lines: list[Any] = []
        self.count = 0

    def add(self, line: Any) -> None:
        self.count += 1
        self.lines.append(line)


@intervene
def fails(net, rows, vector, found, log, names):
    with net.trace(rows):
        found.append(net[0].output.norm())
        log.add("within")
    vector.add_(1)
    noise = torch.rand(2)
    return noise, names["unit"]


@intervene
def fails_large(net, rows, vector):
    with net.trace(rows):
        hidden = net[0].output
    vector.add_(1)
    return hidden[{}["unit"]]


def given() -> tuple[torch.Tensor, list[Any], Log]:
    torch.manual_seed(5)
    return torch.zeros(3), [], Log()


def test_what_was_changed_before_an_error_stays_changed(net: NNsight) -> None:
    here, there = given(), given()
    torch.manual_seed(5)
    with pytest.raises(KeyError, match="unit"):
        fails(net, ROWS, *here, {})
    drawn = torch.rand(3)
    lines = there[2].lines
    torch.manual_seed(5)
    with pytest.raises(KeyError, match="unit") as caught:
        fails(net, ROWS, *there, {}, remote="local")
    assert 'names["unit"]' in caught.value.__notes__[-1]
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(there[0], here[0])
    assert torch.equal(here[0], torch.ones(3))
    torch.testing.assert_close(there[1], here[1])
    assert len(there[1]) == 1
    assert there[2].lines is lines
    assert (there[2].lines, there[2].count) == (here[2].lines, 1) == (["within"], 1)


def test_the_next_job_finds_the_code_as_it_was_sent(net: NNsight) -> None:
    first, second = given(), given()
    for each in (first, second):
        with pytest.raises(KeyError):
            fails(net, ROWS, *each, {}, remote="local")
        assert each[2].count == 1


def test_what_is_too_large_is_told(net: NNsight) -> None:
    vector = torch.zeros(MOST_CHANGED)
    with pytest.raises(KeyError) as caught:
        fails_large(net, ROWS, vector, remote="local")
    assert not vector.any()
    note = "what it had changed before is not carried back: 1 MiB, and an error takes at most 256 KiB"
    assert note in caught.value.__notes__


def test_changes_that_are_none(net: NNsight, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight_compiler.remote import backends

    made = {"text": "!!!"}
    plain = backends.error_record
    monkeypatch.setattr(backends, "error_record", lambda error: {**plain(error), "changes": made["text"]})
    for text, note in (
        ("!!!", "what it had changed before came back damaged"),
        (base64.b64encode(b"12345678").decode(), "what it had changed before cannot be read: this is no safetensors"),
    ):
        made["text"] = text
        found = given()
        with pytest.raises(KeyError) as caught:
            fails(net, ROWS, *found, {}, remote="local")
        assert any(each.startswith(note) for each in caught.value.__notes__)
        assert not found[0].any()


def test_a_service_tells_no_more_than_it_may() -> None:
    assert failure({"kind": "KeyError", "changes": 3})["changes"] is None
    assert failure({"kind": "KeyError", "changes": "A" * (2 * MOST_CHANGED + 1)})["changes"] is None
    with pytest.raises(Exception) as caught:
        raise_from(failure(error_record(ValueError("no"))))
    assert left(caught.value) is None


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    state: Path = tmp_path_factory.mktemp("service") / "state"
    with executing_service(state) as (found, _):
        yield found


@intervene
def asks(model, prompt, found, names):
    with model.trace(prompt):
        found.append(model.layers[0].output[0, -1].norm())
    return names["unit"]


def test_over_a_socket(url: str) -> None:
    model = LanguageModel("tiny", remote=url)
    here = LanguageModel("tiny", dispatch=True)
    wanted: list[Any] = []
    with pytest.raises(KeyError):
        asks(here, PROMPT, wanted, {})
    found: list[Any] = []
    with pytest.raises(KeyError, match="unit"):
        asks(model, PROMPT, found, {})
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    found.clear()
    handle = asks(model, PROMPT, found, {}, blocking=False)
    for _ in range(2):
        with pytest.raises(KeyError, match="unit"):
            handle.result()
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert handle.status() == "failed"
