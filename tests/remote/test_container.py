"""The header of a safetensors file: what the library writes is read as it reads it; all else is refused, quickly."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from nnsight_compiler import FileError
from nnsight_compiler.remote.container import ITEM_SIZES, Header, job_header, read_header

DIGEST = "0123456789abcdef" * 4


def written(header: Any, data: bytes = b"", text: str | None = None) -> bytes:
    """A file with this header, sound or not."""
    encoded = (json.dumps(header) if text is None else text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(start: int = 0, end: int = 4, dtype: str = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def job(tensors: dict[str, Any] | None = None, **changes: Any) -> bytes:
    document = {"format": "nnsight-compiler-job", "version": 1, "model": "tiny", "blobs": {}, **changes}
    held = {"__metadata__": {"nnsight-compiler": json.dumps(document)}, **(tensors or {})}
    return written(held, b"\0" * max((each["data_offsets"][1] for each in (tensors or {}).values()), default=0))


def test_what_the_library_writes_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    chance, path = random.Random(3), tmp_path / "some.safetensors"
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
              torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]  # fmt: skip
    seen: set[str] = set()
    for number in range(40):
        tensors = {
            f"data.{each}": torch.zeros([chance.randrange(4) for _ in range(chance.randrange(4))]).to(
                chance.choice(dtypes)
            )
            for each in range(number % 9)
        }
        metadata = {"a": 'b"\\{[', "nnsight-compiler": "é" * number} if number % 2 else None
        save_file(tensors, path, metadata)
        content = path.read_bytes()
        found = read_header(path)
        assert found == read_header(content)
        assert found.size == len(content)
        assert found.metadata == (metadata or {})
        with safe_open(path, "pt") as opened:
            assert set(found.tensors) == set(opened.keys())
            for name, each in found.tensors.items():
                held = opened.get_slice(name)
                assert (each.dtype, list(each.shape)) == (held.get_dtype(), held.get_shape())
                assert each.end - each.start == tensors[name].nbytes
                seen.add(each.dtype)
    assert seen == set(ITEM_SIZES)


BIG = 2**31 - 1
EMPTY = json.dumps(entry(0, 0, shape=[0]))
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "this is no safetensors file, or it is cut off"),
    "a script": (lambda: b"import os; os.system('x')", "this is no safetensors file, or it is cut off"),
    "a length past the end": (
        lambda: struct.pack("<Q", 2**63) + b"{}", "this is no safetensors file, or it is cut off",
    ),
    "a long header": (
        lambda: written({}, text="{" + " " * 5 * 2**20 + "}"),
        "the header has 5242882 bytes, and 4194304 are the most that is read",
    ),
    "200,000 entries": (
        lambda: written({}, text="{" + ",".join(f'"{n}":{{}}' for n in range(200_000)) + "}"),
        "the header describes more than 4096 tensors",
    ),
    "200,000 empty tensors": (
        lambda: written({}, text="{" + ",".join(f'"{n}":{EMPTY}' for n in range(200_000)) + "}"),
        "and 4194304 are the most that is read",
    ),
    "4,097 tensors": (
        lambda: written({str(n): entry(0, 0, shape=[0]) for n in range(4097)}),
        "the header describes more than 4096 tensors",
    ),
    "numbers for two megabytes": (
        lambda: written({}, text='{"a":{"dtype":"F32","shape":[' + "0," * 2**20 + "0]}}"),
        "what the header says of tensors takes 2097163 characters, and may take 1048576",
    ),
    "brackets": (lambda: written({}, text="[" * 2**20), "the header is nested more than 3 deep"),
    "brackets in a tensor": (lambda: written({"a": [[[[]]]]}), "the header is nested more than 3 deep"),
    "a string that is cut off": (lambda: written({}, text='{"' + '\\"' * 2**21), "4194306 bytes"),
    "quotes that never end": (lambda: written({}, text='{"' + '\\"' * (2**21 - 2)), "the document is no JSON"),
    "a backslash at the end": (lambda: written({}, text='{"a\\'), "the document is no JSON"),
    "no UTF-8": (lambda: struct.pack("<Q", 4) + b"{\xff\xfe}", "the header is no UTF-8: invalid start byte at byte 1"),
    "a space before": (lambda: written({}, text=" {}"), "the header does not begin with `{`"),
    "a list": (lambda: written([]), "the header does not begin with `{`"),
    "two headers": (lambda: written({}, text="{}{}"), "the document is no JSON: Extra data"),
    "a path": (lambda: written({"../../etc/x": entry()}, b"1234"), "'../../etc/x' is no name of a tensor"),
    "an absolute path": (lambda: written({"/etc/x": entry()}, b"1234"), "'/etc/x' is no name of a tensor"),
    "no name": (lambda: written({"": entry()}, b"1234"), "'' is no name of a tensor"),
    "a long name": (lambda: written({"a" * 129: entry()}, b"1234"), "is no name of a tensor"),
    "half of a pair": (lambda: written({"\ud800": entry()}, b"1234"), r"'\ud800' is no name of a tensor"),
    "a line end": (lambda: written({"a\n": entry()}, b"1234"), r"'a\n' is no name of a tensor"),
    "a name twice": (
        lambda: written({}, b"1234", f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry())}}}'),
        "the key 'a' stands twice in one object",
    ),
    "a field twice": (
        lambda: written({}, b"1234", '{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        "the key 'dtype' stands twice in one object",
    ),
    "another field": (lambda: written({"a": {**entry(), "x": 1}}, b"1234"), "unknown field 'x'"),
    "a field too few": (lambda: written({"a": {"dtype": "F32"}}), "the field 'shape' is missing"),
    "an unknown dtype": (lambda: written({"a": entry(dtype="O")}, b"1234"), "'O' is no dtype that is stored"),
    "a dtype that is a list": (lambda: written({"a": entry(dtype=[])}, b"1234"), "expected a string"),  # type: ignore[arg-type]
    "zero times a giant": (lambda: written({"a": entry(0, 0, shape=[0, 2**40])}), "expected a whole number from 0 to"),
    "zero times several": (
        lambda: written({"a": entry(0, 0, shape=[0, BIG, BIG])}),
        "the tensor is empty, and larger than any that is not",
    ),
    "a negative size": (lambda: written({"a": entry(shape=[-1])}, b"1234"), "expected a whole number from 0"),
    "true for a size": (lambda: written({"a": entry(shape=[True])}, b"1234"), "expected a whole number from 0"),
    "a fraction": (lambda: written({"a": entry(shape=[1.0])}, b"1234"), "expected a whole number from 0"),
    "NaN": (lambda: written({}, text='{"a": NaN}'), "NaN is no number of JSON"),
    "infinity": (lambda: written({}, text='{"a": -Infinity}'), "-Infinity is no number of JSON"),
    "a long number": (lambda: written({}, text='{"a": ' + "9" * 100_000 + "}"), "a number has 100000 digits"),
    "many axes": (lambda: written({"a": entry(shape=[1] * 65)}, b"1234"), "a tensor has at most 64 axes"),
    "other bytes": (lambda: written({"a": entry(shape=[2])}, b"1234"), "does not take the 4 bytes that it is given"),
    "offsets backwards": (lambda: written({"a": entry(4, 0)}, b"1234"), "does not take the -4 bytes"),
    "an overlap": (lambda: written({"a": entry(), "b": entry(2, 6)}, b"123456"), "the tensor overlaps with another"),
    "the same bytes twice": (lambda: written({"a": entry(), "b": entry()}, b"1234"), "the tensor overlaps"),
    "a gap": (lambda: written({"a": entry(4, 8)}, b"12345678"), "the tensor leaves bytes before it to no tensor"),
    "bytes left over": (lambda: written({"a": entry()}, b"12345"), "the file has bytes that belong to no tensor"),
    "bytes missing": (lambda: written({"a": entry()}, b"123"), "the file is cut off: its tensors take 4 bytes, and 3"),
    "metadata that is none": (lambda: written({"__metadata__": {"a": 1}}), "expected a string"),
    "metadata in a list": (lambda: written({"__metadata__": []}), "expected an object"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_with_the_reason(name: str) -> None:
    make, reason = HOSTILE[name]
    content = make()
    begun = time.process_time()
    with pytest.raises(FileError) as caught:
        read_header(content)
    assert reason in str(caught.value)
    assert time.process_time() - begun < 0.5


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read: No such file or directory"):
        read_header(tmp_path / "nothing")


def test_the_envelope_of_a_job() -> None:
    tensors = {"data.0": entry()}
    found = job_header(read_header(job(tensors, blobs={"data.1": DIGEST}, anything=[1, {}])))
    assert (found.version, found.model, found.blobs) == (1, "tiny", {"data.1": DIGEST})


BAD_JOBS: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"format": "nnsight-compiler-experiment"}, "at format: expected 'nnsight-compiler-job'"),
    "a later version": ({"version": 2}, "at version: this is version 2, and this service reads version 1"),
    "true for a version": ({"version": True}, "at version: this is version True"),
    "no model": ({"model": None}, "at model: expected a string"),
    "a long model": ({"model": "m" * 257}, "at model: this is no name of a model"),
    "a model of two lines": ({"model": "a\nb"}, "at model: this is no name of a model"),
    "blobs in a list": ({"blobs": []}, "at blobs: expected an object"),
    "a blob by a path": ({"blobs": {"../x": DIGEST}}, "at blobs: '../x' is no name of a tensor"),
    "no digest": ({"blobs": {"data.1": "../../etc/passwd"}}, "at blobs.data.1: expected the sha256 of a file"),
    "a digest in capitals": ({"blobs": {"data.1": DIGEST.upper()}}, "at blobs.data.1: expected the sha256"),
    "a blob that is here": ({"blobs": {"data.0": DIGEST}}, "at blobs.data.0: the tensor is in this file, too"),
    "too many": ({"blobs": {f"data.{n}": DIGEST for n in range(1, 4097)}}, "a job has at most 4096 tensors"),
}


@pytest.mark.parametrize("name", BAD_JOBS)
def test_envelopes_that_are_refused(name: str) -> None:
    changes, reason = BAD_JOBS[name]
    header = read_header(job({"data.0": entry()}, **changes))
    with pytest.raises(FileError) as caught:
        job_header(header)
    assert reason in str(caught.value)


def test_no_job_at_all() -> None:
    with pytest.raises(FileError, match="holds no job: its metadata has no entry 'nnsight-compiler'"):
        job_header(read_header(save({"a": torch.ones(1)})))
    with pytest.raises(FileError, match="the document is nested too deeply"):
        job_header(Header({}, {"nnsight-compiler": '{"a":' * 10**5}, 0))


def test_thousands_of_damaged_headers() -> None:
    chance = random.Random(5)
    whole = job({"data.0": entry(0, 24, shape=(2, 3)), "data.1": entry(24, 26, "BF16")}, blobs={"data.2": DIGEST})
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for _ in range(3000):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            content[chance.randrange(length)] = chance.choice(b'0123456789[]{},:"\\-eaF\x00\xff')
        try:
            job_header(read_header(bytes(content)))
        except FileError:
            refused += 1
    assert 1500 < refused < 3000
