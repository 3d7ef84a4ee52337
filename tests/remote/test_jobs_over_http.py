"""Experiments on a service that is asked over a socket: values equal those of plain hooks on the model here."""

from __future__ import annotations

import asyncio
import hashlib
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from executing_service import ThreadEngine, executing_service

from nnsight_compiler import LanguageModel, intervene
from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.models import tiny_folder
from nnsight_compiler.remote.client import BLOB_BYTES, connect
from nnsight_compiler.remote.handles import JobHandle
from nnsight_compiler.remote.job import blob
from nnsight_compiler.remote.refusals import JobCancelledError, JobRefusedError

PROMPT, OTHER = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ThreadEngine]]:
    with executing_service(tmp_path_factory.mktemp("service") / "state") as found:
        yield found


@pytest.fixture(scope="module")
def url(service: tuple[str, ThreadEngine]) -> str:
    return service[0]


@pytest.fixture
def engine(service: tuple[str, ThreadEngine]) -> Iterator[ThreadEngine]:
    yield service[1]
    service[1].hold = None


@pytest.fixture(scope="module")
def model(url: str) -> LanguageModel:
    """A model whose weights never come here."""
    found = LanguageModel("tiny", remote=url)
    yield found
    assert {parameter.device.type for parameter in found._wrapped.parameters()} == {"meta"}


@pytest.fixture(scope="module")
def plain() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_folder()).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_folder())


def patched(plain: Any, tokenizer: Any, layer: int) -> torch.Tensor:
    """Patching the last position of a layer, with plain hooks."""
    kept = {}
    block = plain.transformer.h[layer]
    with torch.no_grad():
        hook = block.register_forward_hook(lambda module, args, output: kept.update(h=first(output).clone()))
        plain(**tokenizer(PROMPT, return_tensors="pt"))
        hook.remove()

        def write(module: Any, args: Any, output: Any) -> None:
            first(output)[:, -1] = kept["h"][:, -1]

        hook = block.register_forward_hook(write)
        logits = plain(**tokenizer(OTHER, return_tensors="pt")).logits[:, -1]
        hook.remove()
    return logits.softmax(-1)


def first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@intervene
def patch(model, clean, corrupt, layer):
    with model.trace(clean):
        source = model.layers[layer].output[:, -1]
    with model.trace(corrupt):
        model.layers[layer].output[:, -1] = source
        logits = model.lm_head.output[:, -1]
    print("layer", layer)
    return logits.softmax(-1)


def test_an_experiment(
    model: LanguageModel, url: str, plain: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    probabilities = patch(model, PROMPT, OTHER, 1, remote=url)
    torch.testing.assert_close(probabilities, patched(plain, tokenizer, 1))
    assert capsys.readouterr().out == "layer 1\n"


def test_an_undecorated_trace(model: LanguageModel, url: str, plain: Any, tokenizer: Any) -> None:
    with model.trace(PROMPT, remote=url):
        hidden = model.layers[1].output[:, -1].save()
        logits = model.output.logits.save()
    with torch.no_grad():
        expected = plain(**tokenizer(PROMPT, return_tensors="pt"), output_hidden_states=True)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(hidden, expected.hidden_states[2][:, -1])


def test_where_the_model_is_everything_runs(model: LanguageModel, plain: Any, tokenizer: Any) -> None:
    torch.testing.assert_close(patch(model, PROMPT, OTHER, 2), patched(plain, tokenizer, 2))
    with model.session():
        with model.trace(PROMPT):
            source = model.layers[2].output[:, -1]
        with model.trace(OTHER):
            model.layers[2].output[:, -1] = source
            probabilities = model.lm_head.output[:, -1].softmax(-1).save()
    torch.testing.assert_close(probabilities, patched(plain, tokenizer, 2))
    handle = patch(model, PROMPT, OTHER, 2, blocking=False)
    torch.testing.assert_close(handle.result(), patched(plain, tokenizer, 2))
    with pytest.raises(ModelError, match="this needs the weights of tiny here, and they are at http"):
        patch(model, PROMPT, OTHER, 2, remote=False)


def test_not_waiting(model: LanguageModel, url: str, engine: ThreadEngine, plain: Any, tokenizer: Any) -> None:
    engine.hold = threading.Event()
    handles = [patch(model, PROMPT, OTHER, layer, remote=url, blocking=False) for layer in range(3)]
    assert all(isinstance(handle, JobHandle) for handle in handles)
    with pytest.raises(TimeoutError):
        handles[0].result(timeout=0.05)
    assert handles[1].cancel() in ("cancelled", "running")
    engine.hold.set()

    async def both() -> list[torch.Tensor]:
        return await asyncio.gather(handles[0], handles[2])

    for layer, found in zip((0, 2), asyncio.run(both()), strict=True):
        torch.testing.assert_close(found, patched(plain, tokenizer, layer))
    with pytest.raises(JobCancelledError):
        handles[1].result()
    assert [handle.status() for handle in handles] == ["completed", "cancelled", "completed"]


def test_a_trace_that_is_not_waited_for(model: LanguageModel, url: str, plain: Any, tokenizer: Any) -> None:
    with model.trace(PROMPT, remote=url, blocking=False) as handle:
        hidden = model.layers[1].output[:, -1].save()
    assert isinstance(handle, JobHandle)
    assert "hidden" not in locals(), "nothing is assigned before it is there"
    found = handle.result()
    with torch.no_grad():
        expected = plain(**tokenizer(PROMPT, return_tensors="pt"), output_hidden_states=True)
    assert list(found) == ["hidden"]
    torch.testing.assert_close(found["hidden"], expected.hidden_states[2][:, -1])


def test_an_error_of_the_experiment(model: LanguageModel, url: str) -> None:
    @intervene
    def wrong(model, prompt, names):
        with model.trace(prompt):
            hidden = model.layers[0].output
        return hidden[0, 0, 0], names["missing"]

    with pytest.raises(KeyError, match="missing") as raised:
        wrong(model, PROMPT, {"present": 1}, remote=url)
    assert any(f"{Path(__file__).name}:" in note for note in raised.value.__notes__)


def test_a_model_that_the_service_does_not_have(url: str) -> None:
    other = LanguageModel("tiny")
    other._source = "huge"
    with pytest.raises(JobRefusedError) as raised:
        patch(other, PROMPT, OTHER, 1, remote=url)
    assert str(raised.value) == f"{url} refuses this job: this service has no model 'huge'; it has: tiny"


def test_a_large_tensor_is_sent_once(
    model: LanguageModel, url: str, monkeypatch: pytest.MonkeyPatch, plain: Any, tokenizer: Any
) -> None:
    backend = connect(url)
    sizes: list[tuple[str, int]] = []
    ask = backend.connection.ask

    def counted(method: str, path: str, asked: str, **rest: Any) -> Any:
        sizes.append((f"{method} {path[:8]}", len(rest.get("content") or b"")))
        return ask(method, path, asked, **rest)

    monkeypatch.setattr(backend.connection, "ask", counted)
    vectors = torch.randn(2, 128, 128)
    assert vectors.nbytes > BLOB_BYTES

    @intervene
    def steer(model, prompt, vectors, which):
        with model.trace(prompt):
            model.layers[1].output[:, -1] += vectors[which, which]
            logits = model.lm_head.output[:, -1]
        return logits

    def expected(which: int) -> torch.Tensor:
        def write(module: Any, args: Any, output: Any) -> None:
            first(output)[:, -1] += vectors[which, which]

        hook = plain.transformer.h[1].register_forward_hook(write)
        with torch.no_grad():
            logits = plain(**tokenizer(PROMPT, return_tensors="pt")).logits[:, -1]
        hook.remove()
        return logits

    for which in range(2):
        torch.testing.assert_close(steer(model, PROMPT, vectors, which, remote=url), expected(which))
    assert [name for name, _ in sizes] == ["HEAD /v1/blob", "PUT /v1/blob", "POST /v1/jobs", "POST /v1/jobs"]
    assert all(size < 16_000 for name, size in sizes if name.startswith("POST"))
    vectors += 1
    torch.testing.assert_close(steer(model, PROMPT, vectors, 0, remote=url), expected(0))
    assert [name for name, _ in sizes[4:]] == ["HEAD /v1/blob", "PUT /v1/blob", "POST /v1/jobs"]


def test_a_tensor_that_the_service_has_forgotten_is_sent_again(model: LanguageModel, url: str) -> None:
    @intervene
    def largest(model, prompt, values):
        with model.trace(prompt):
            hidden = model.layers[0].output[0, 0, 0]
        return hidden * 0 + values.max()

    backend, values = connect(url), torch.arange(20_000.0)
    backend._blobs.add(hashlib.sha256(blob(values)).hexdigest())
    assert largest(model, PROMPT, values, remote=url) == 19_999


def test_a_job_costs_little(model: LanguageModel, url: str) -> None:
    here = LanguageModel("tiny", dispatch=True)

    @intervene
    def hidden(model, prompt):
        with model.trace(prompt):
            found = model.layers[0].output[:, -1]
        return found

    def median(**options: Any) -> float:
        times = []
        for _ in range(15):
            began = time.perf_counter()
            hidden(here, PROMPT, **options)
            times.append(time.perf_counter() - began)
        return statistics.median(times[3:])

    local, remote = median(), median(remote=url)
    assert remote - local < 0.25, f"{local * 1e3:.2f} ms here, {remote * 1e3:.2f} ms over HTTP"
