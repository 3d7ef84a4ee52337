"""What a file can hold, each kind: the loaded experiment gives what the function itself gives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  as everyone writes it
from safetensors import safe_open

from nnsight_compiler import Experiment, UnusedValueWarning, intervene, save

NUMBER, TEXT, DATA, NOTHING = 3, "half \ud800 of a pair", b"\x00\xff", None
HUGE, TINY_NUMBER, IMAGINARY = 2**70, float("-inf"), 1 - 2j
NESTED = {"a": [1, (2.5, "x")], ("k", 2): {1, 2}, 3: frozenset({"f"}), "r": range(2, 9, 3), "s": slice(1, None, 2)}
DTYPE, DEVICE, SIZE = torch.bfloat16, torch.device("cpu"), torch.Size([2, 3])
SHARED = [1, 2]
TWICE = {"one": SHARED, "two": SHARED}
BASE = torch.arange(12.0).reshape(3, 4)
ROW, FLIPPED, FAR = BASE[1], BASE.T, torch.arange(10_000.0)[::1000]
LEARNED = torch.ones(3, requires_grad=True)
DTYPES = {
    str(dtype): torch.tensor([0, 1, 2, 3]).to(dtype)
    for dtype in (
        torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.uint16,
        torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2fnuz,
    )
}  # fmt: skip


def test_constants(through) -> None:
    def constants():
        return NUMBER, TEXT, DATA, NOTHING, HUGE, TINY_NUMBER, IMAGINARY, NESTED, DTYPE, DEVICE, SIZE, ...

    assert repr(through(constants)()) == repr(constants())


def test_not_a_number_and_the_sign_of_zero(through) -> None:
    odd = (float("nan"), -0.0)

    def constants():
        return odd

    found = through(constants)()
    assert math.isnan(found[0])
    assert math.copysign(1, found[1]) == -1


def test_what_was_one_list_stays_one(through) -> None:
    def grow():
        TWICE["one"].append(3)
        return TWICE["two"], TWICE["one"] is SHARED

    assert through(grow)() == ([1, 2, 3], True)
    assert SHARED == [1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_dtype(through, dtype: str) -> None:
    held = DTYPES[dtype]

    def give():
        return held

    found = through(give)()
    assert found.dtype == held.dtype
    assert torch.equal(found.view(torch.uint8), held.view(torch.uint8))


def test_tensors_of_every_shape(through) -> None:
    tensors = [torch.tensor(2.5), torch.empty(0, 3), torch.ones(2, 1).expand(2, 5), BASE.T[1:], FAR]

    def give():
        return tensors

    for found, held in zip(through(give)(), tensors, strict=True):
        assert torch.equal(found, held)
        assert found.shape == held.shape


def test_what_shares_storage_shares_it_and_is_stored_once(through, tmp_path) -> None:
    def change():
        ROW[:] = -1
        return BASE, FLIPPED

    found, flipped = through(change)()
    assert torch.equal(found[1], torch.full((4,), -1.0))
    assert torch.equal(flipped, found.T)
    assert flipped.stride() == FLIPPED.stride()
    assert torch.equal(BASE[1], torch.arange(4.0, 8.0)), "the file has a copy"
    with safe_open(str(tmp_path / "change.safetensors"), framework="pt") as opened:
        assert [opened.get_slice(name).get_shape() for name in opened.keys()] == [[12]]  # noqa: SIM118


def test_of_a_slice_only_the_slice_is_stored(through, tmp_path) -> None:
    def give():
        return FAR

    assert torch.equal(through(give)(), FAR)
    with safe_open(str(tmp_path / "give.safetensors"), framework="pt") as opened:
        assert opened.get_slice("FAR").get_shape() == [10]


def test_tensors_that_require_gradients(through) -> None:
    def square():
        return (LEARNED**2).sum(), LEARNED

    loss, leaf = through(square)()
    loss.backward()
    assert torch.equal(leaf.grad, torch.full((3,), 2.0))
    assert LEARNED.grad is None


ONES = torch.ones(2)


def double(x, factor=2, *, offset=ONES):
    return x * factor + offset


def even(n):
    return True if n == 0 else odd(n - 1)


def odd(n):
    return False if n == 0 else even(n - 1)


def make_adder(amount):
    def add(x):
        return x + amount

    return add


add_five = make_adder(torch.tensor(5.0))


def test_helpers_with_defaults_closures_and_recursion(through) -> None:
    square = lambda x: x**2  # noqa: E731

    def compute(x):
        return double(x), double(x, 3, offset=0), even(10), odd(10), add_five(x), square(x)

    x = torch.tensor([1.0, 2.0])
    for found, expected in zip(through(compute)(x), compute(x), strict=True):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_helpers_of_another_module_keep_their_own_names(written, through) -> None:
    other = written("SCALE = 10\nsum = max\ndef scaled(x):\n    return sum([x * SCALE, 0]), len([1, 2])\n", "other.py")
    mine = written(
        "SCALE = 2\ndef len(x):\n    return 'mine'\n"
        "def both(x):\n    return scaled(x), x * SCALE, sum([1, 2]), len([])\n"
    )
    mine["scaled"] = other["scaled"]
    assert through(mine["both"])(4) == ((40, 2), 8, 3, "mine") == mine["both"](4)


def test_globals_that_a_function_sets_are_the_files_own(written, through) -> None:
    scope = written(
        "count = 0\ndef bump():\n    global count\n    count += 1\n    return count\n"
        "def twice():\n    bump()\n    return bump()\n"
    )
    loaded = through(scope["twice"])
    assert (loaded(), loaded()) == (2, 4)
    assert scope["count"] == 0


def test_libraries_and_their_functions_under_any_name(through) -> None:
    relu = F.relu
    functions = {"tanh": torch.tanh, "sqrt": math.sqrt}

    def compute(x):
        from math import pi

        import torch.nn.functional as other

        return relu(x), F.gelu(x), functions["tanh"](x), functions["sqrt"](4), other.silu(x), pi, torch.float32, math.e

    x = torch.tensor([-1.0, 2.0])
    for found, expected in zip(through(compute)(x), compute(x), strict=True):
        if isinstance(found, torch.dtype):
            assert found is expected
        else:
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_libraries_that_are_looked_up_only_when_it_runs(through) -> None:
    einops = pytest.importorskip("einops")
    from tqdm import tqdm

    def compute(x):
        rows = [row for row in tqdm(x, disable=True)]
        return einops.rearrange(torch.stack(rows), "a b -> b a")

    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(through(compute)(x), x.T)


def test_defaults_and_the_signature(through) -> None:
    def signature(a, /, b, c=BASE, *rest, d=NESTED, e, **more):
        return a, b, c, rest, d, e, more

    loaded = through(signature)
    assert str(loaded).partition("(")[2][:12] == "a, /, b, c=t"
    assert loaded(1, 2, e=3)[1] == 2
    assert torch.equal(loaded(1, b=2, e=3)[2], BASE)
    assert loaded(1, 2, 3, 4, 5, e=6, f=7)[2:] == (3, (4, 5), NESTED, 6, {"f": 7})
    with pytest.raises(TypeError, match=r"signature\(\) missing 1 required positional argument: 'b'"):
        loaded(1, e=2)


def test_a_docstring_and_a_qualified_name(through) -> None:
    def documented():
        """What it is for."""
        return 1

    loaded = through(documented)
    assert loaded.__doc__ == "What it is for."
    assert loaded.__qualname__ == documented.__qualname__


def test_the_function_save_of_this_package(through, tiny) -> None:
    keep = save

    def kept(model, prompt):
        with model.trace(prompt):
            found = [keep(layer.output) for layer in model.layers], save(model.output.logits)
        return found

    for found, expected in zip(through(kept)(tiny, "a b")[0], intervene(kept)(tiny, "a b")[0], strict=True):
        assert torch.equal(found, expected)


def test_the_model_from_around_it(through, tiny) -> None:
    model, block = tiny, tiny.layers[1]

    def outside(prompt):
        with model.trace(prompt):
            hidden = block.output[0, -1]
        return hidden

    expected = intervene(outside)("The city of")
    assert torch.equal(through(outside, model=tiny)("The city of"), expected)


def test_a_helper_that_touches_the_model(through, tiny) -> None:
    def residual(model, layer):
        return model.layers[layer].output

    def first(model, prompt, layer):
        with model.trace(prompt):
            hidden = residual(model, layer)[0, -1]
        return hidden

    assert torch.equal(through(first)(tiny, "a b", 1), intervene(first)(tiny, "a b", 1))


def test_saved_again_it_is_the_same_file(through, tmp_path, tiny) -> None:
    vector = torch.linspace(-1, 1, 128)

    def steer(model, prompt, strength=2.0):
        with model.trace(prompt):
            model.layers[1].output += double(vector, strength, offset=0)
            logits = model.lm_head.output[0, -1]
        return logits

    once = through(steer)
    once.save(tmp_path / "again.safetensors")
    again = Experiment.load(tmp_path / "again.safetensors")
    assert again.ir == once.ir == intervene(steer).ir
    expected = intervene(steer)(tiny, "a b")
    assert torch.equal(once(tiny, "a b"), expected)
    assert torch.equal(again(tiny, "a b"), expected)


def test_lower_compile_and_the_cache(through, tiny) -> None:
    def hidden(model, prompt, layer):
        with model.trace(prompt):
            found = model.layers[layer].output
        return found

    loaded, plain = through(hidden), intervene(hidden)
    assert str(loaded.lower(tiny, "a b", 1)) == str(plain.lower(tiny, "a b", 1))
    assert loaded.compile(tiny, "a b", 1).source == plain.compile(tiny, "a b", 1).source
    loaded(tiny, "a b", 1), loaded(tiny, "c d", 1), loaded(tiny, "a b", 2)
    assert loaded.cache_info()[:2] == (2, 2)


def test_warnings_come_from_the_users_lines(through, tiny) -> None:
    def forgotten(model, prompt):
        with model.trace(prompt):
            hidden = model.layers[1].output
            hidden = hidden * 0
            logits = model.output.logits
        return logits

    with pytest.warns(UnusedValueWarning) as caught:
        through(forgotten)(tiny, "a b")
    assert caught[0].filename == __file__
    assert caught[0].lineno == forgotten.__code__.co_firstlineno + 3


def test_a_helper_whose_model_is_a_global_runs_it(tiny, written, tmp_path) -> None:
    found = written(
        "from nnsight_compiler import intervene\n"
        "def inner(text):\n"
        "    with model.trace(text):\n"
        "        norm = model.lm_head.output.norm().save()\n"
        "    return norm\n"
        "def outer(text):\n"
        "    return inner(text) * 2\n"
        "@intervene\n"
        "def norms(model_, text):\n"
        "    return inner(text), outer(text)\n"
    )
    found["norms"]._function.__globals__["model"] = tiny
    found["norms"].save(tmp_path / "norms.safetensors")
    loaded = Experiment.load(tmp_path / "norms.safetensors", model=tiny)
    with torch.no_grad():
        ids = tiny.tokenizer("a b", return_tensors="pt")["input_ids"]
        norm = tiny._module(ids).logits.norm()
    torch.testing.assert_close(loaded(tiny, "a b"), (norm, norm * 2))
