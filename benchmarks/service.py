"""A service on this machine: what a job costs beyond the experiment itself, with one client and with many, and what
sharing forwards gains.

python benchmarks/service.py                     all parts, as JSON
python benchmarks/service.py overhead clients    some

overhead   one client, a tiny model: the same experiment here and through the service, in turns
clients    64 clients, at half of the measured capacity
sharing    16 clients with compatible jobs on a model of GPT-2-small's shape, against one job at a time
size       bytes of the request and the result of a layer's output on 15 tokens
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_compiler import LanguageModel, intervene
from nnsight_compiler.remote.client import connect
from nnsight_compiler.remote.job import pack
from nnsight_compiler.remote.outside import sent

PROMPT = "The Eiffel Tower is in the city of"


@intervene
def patch(model, clean, corrupt, layer, position):
    with model.trace(clean):
        source = model.layers[layer].output[:, position]
    with model.trace(corrupt):
        model.layers[layer].output[:, position] = source
        logits = model.lm_head.output[:, -1]
    return logits.softmax(-1)


@intervene
def steer(model, ids, vector):
    with model.trace(ids):
        model.layers[6].output[:, -1] += vector
        logits = model.lm_head.output[0, -1]
    return logits.topk(5).indices


@intervene
def layer_output(model, ids):
    with model.trace(ids):
        hidden = model.layers[1].output.save()
    return hidden


@contextmanager
def served(model: str, *options: str) -> Iterator[str]:
    """The address of a service with this model."""
    with tempfile.TemporaryDirectory() as state:
        nnsightc = str(Path(sys.executable).with_name("nnsightc"))
        command = [nnsightc, "serve", model, "--port", "0", "--state", state, *options]
        surroundings = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                found = re.search(r" at (http://\S+)", line)
                if found:
                    break
            else:
                sys.exit("the service did not start")
            yield found[1]
        finally:
            process.terminate()
            process.wait()


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1000


def percentiles(taken: list[float]) -> dict[str, float]:
    parts = statistics.quantiles(taken, n=100)
    return {"median": round(statistics.median(taken), 2), "p90": round(parts[89], 2), "p99": round(parts[98], 2)}


def overhead(rounds: int = 200) -> dict[str, Any]:
    """One client: each round runs the experiment here and there, as a job like the one before (`known`, which is not
    checked again), and as one on a prompt of its own (`new`)."""
    model = LanguageModel("tiny", dispatch=True)
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {"here": [], "known": [], "new": []}
    with served("tiny", "--threads", "1") as url:

        def turn(number: int) -> None:
            known = (model, PROMPT, "The Space Needle is in the city of", 1, -1)
            new = (model, PROMPT, f"The Space Needle is in the city of {number}", 1, -1)
            taken["here"].append(timed(lambda: patch(*known)))
            taken["known"].append(timed(lambda: patch(*known, remote=url)))
            taken["new"].append(timed(lambda: patch(*new, remote=url)))
            if number == 0:
                assert torch.allclose(patch(*known), patch(*known, remote=url), atol=1e-5)
                assert torch.allclose(patch(*new), patch(*new, remote=url), atol=1e-5)

        for number in range(20 + rounds):
            turn(number)
    taken = {name: times[20:] for name, times in taken.items()}
    beyond = {
        name: percentiles([there - here for here, there in zip(taken["here"], taken[name], strict=True)])
        for name in ("known", "new")
    }
    return {"here_ms": percentiles(taken["here"]), "overhead_ms": beyond}


def clients(count: int = 64, seconds: float = 15.0) -> dict[str, Any]:
    """Clients that together send half as many jobs as the service can run."""
    model = LanguageModel("tiny", dispatch=True)
    torch.set_num_threads(1)
    ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    with served("tiny", "--threads", "1") as url:
        first = patch(model, ids, ids, 1, -1, remote=url)
        here = statistics.median(timed(lambda: patch(model, ids, ids, 1, -1)) for _ in range(50))

        def hammer(stop: float, every: float | None, taken: list[float]) -> None:
            due = time.monotonic()
            while time.monotonic() < stop:
                taken.append(timed(lambda: patch(model, ids, ids, 1, -1, remote=url)))
                if every is not None:
                    due += every
                    time.sleep(max(0.0, due - time.monotonic()))

        def together(every: float | None) -> tuple[list[float], float]:
            taken: list[list[float]] = [[] for _ in range(count)]
            began = time.monotonic()
            threads = [threading.Thread(target=hammer, args=(began + seconds, every, each)) for each in taken]
            for thread in threads:
                if every is not None:
                    time.sleep(every / count)
                thread.start()
            for thread in threads:
                thread.join()
            return [each for some in taken for each in some[1:]], time.monotonic() - began

        together(None)
        full, lasted = together(None)
        capacity = len(full) / lasted
        half, lasted = together(2 * count / capacity)
        assert first.shape[0] == 1
    beyond = [each - here for each in half]
    return {
        "clients": count, "capacity_per_second": round(capacity, 1), "rate_per_second": round(len(half) / lasted, 1),
        "here_ms": round(here, 2), "overhead_ms": percentiles(beyond), "at_capacity_ms": percentiles(full),
    }  # fmt: skip


def sharing(count: int = 16, each: int = 8) -> dict[str, Any]:
    """Compatible jobs of many clients, against the same jobs one at a time."""
    torch.manual_seed(0)
    ids = torch.randint(0, 50257, (1, 15))
    vectors = torch.randn(count, 768)
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        with served(f"small={folder}") as url:
            model = LanguageModel("small", remote=url)

            def send(number: int, times: int, found: dict[int, Any]) -> None:
                for _ in range(times):
                    found[number] = steer(model, ids, vectors[number], remote=url)

            alone: dict[int, Any] = {}
            send(0, 3, alone)
            one = timed(lambda: [send(number, 1, alone) for number in range(count)]) / count
            shared: dict[int, Any] = {}

            def round_of(times: int) -> float:
                threads = [threading.Thread(target=send, args=(n, times, shared)) for n in range(count)]
                return timed(lambda: ([t.start() for t in threads], [t.join() for t in threads]))

            round_of(2)
            many = round_of(each) / (count * each)
            one = (one + timed(lambda: [send(number, 1, alone) for number in range(count)]) / count) / 2
    equal = all(torch.equal(alone[number], shared[number]) for number in range(count))
    return {
        "one_at_a_time_ms": round(one, 2),
        "together_ms": round(many, 2),
        "gain": round(one / many, 2),
        "equal": equal,
    }


def size() -> dict[str, Any]:
    """Bytes on the wire."""
    model = LanguageModel("tiny", dispatch=True)
    ids = torch.arange(15).reshape(1, 15)
    with served("tiny", "--threads", "1") as url:
        job = sent(layer_output.ir, {}, {}, {"model": model, "ids": ids}, lambda _: "tiny").job
        result = connect(url).run(job)
    tensors = 15 * 128 * 4
    return {"request": len(pack(job)), "result": len(result), "tensors": tensors, "beyond": len(result) - tensors}


PARTS = {"overhead": overhead, "clients": clients, "sharing": sharing, "size": size}

if __name__ == "__main__":
    chosen = sys.argv[1:] or list(PARTS)
    print(json.dumps({name: PARTS[name]() for name in chosen}, indent=2))
