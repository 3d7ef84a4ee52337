"""numpy's rows of the table of known calls, held against what the calls do to real arrays."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from nnsight_compiler.passes.behaviour import Option
from nnsight_compiler.passes.known_calls import Behaviour, callable_of, known_method
from nnsight_compiler.passes.known_numpy import numpy_rows

Broken = Callable[..., str | None]

MISFITS = (TypeError, ValueError, LookupError, AttributeError, np.linalg.LinAlgError, ArithmeticError, SystemError)
ROWS = numpy_rows()


def arrays() -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    square = generator.random((4, 4)) + 4 * np.eye(4)
    return [square, generator.random((2, 4, 4)), generator.integers(0, 4, (4, 4)), square > 4, generator.random(4)]


ARRAYS = arrays()
GENERATOR = np.random.default_rng(0)
OTHERS: list[tuple[Any, ...]] = [
    (), (1,), (0,), (2, 2), ((4, 4),), (np.array(1.0),), ("float64",), (np.float64, np.float32), ([0, 1],), (0, 1),
    (np.array([0, 1]), np.array([5.0, 6.0])), (1, 4), (0, 0, 2), (np.array([True] * 4), np.ones(4)), (0, 2.0, 3),
    (np.array([1]), 0), ([np.ones(4)],), ([],), (2, "same"),
]  # fmt: skip
"""What may come after an array, or stand alone."""
SPECIAL: dict[str, list[tuple[Any, ...]]] = {
    "einsum": [("ij->ji", ARRAYS[0]), ("ij,jk->ik", ARRAYS[0], ARRAYS[0]), ("ii->i", ARRAYS[0])],
    "einsum_path": [("ij,jk->ik", ARRAYS[0], ARRAYS[0])],
    "where": [(ARRAYS[3],), (ARRAYS[3], ARRAYS[0], 0.0)],
    "stack": [([ARRAYS[0], ARRAYS[0]],)],
    "frombuffer": [(bytearray(16),)],
    "linalg.multi_dot": [([ARRAYS[0], ARRAYS[0]],)],
    "interp": [(1.5, [1, 2], [3.0, 4.0])],
    "select": [([ARRAYS[3]], [ARRAYS[0]])],
    "histogram": [(ARRAYS[4], 3)],
    "copyto": [(ARRAYS[0], 1.0)],
    "place": [(ARRAYS[0], ARRAYS[3], [1.0])],
    "put": [(ARRAYS[0], [0], [1.0])],
    "put_along_axis": [(ARRAYS[0], np.zeros((4, 1), dtype=int), 9.0, 1)],
    "putmask": [(ARRAYS[0], ARRAYS[3], 1.0)],
    "fill_diagonal": [(ARRAYS[0], 0.0)],
    "mask_indices": [(3, np.triu)],
    "random.multinomial": [(3, [0.5, 0.5])],
    "random.Generator.multinomial": [(GENERATOR, 3, [0.5, 0.5])],
    "random.Generator.hypergeometric": [(GENERATOR, 4, 4, 4)],
    "random.Generator.multivariate_hypergeometric": [(GENERATOR, [4, 4], 3)],
    "random.Generator.multivariate_normal": [(GENERATOR, [0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])],
    "random.Generator.noncentral_f": [(GENERATOR, 2.0, 2.0, 2.0)],
    "polyfit": [([0.0, 1.0, 2.0], [1.0, 2.0, 3.0], 1)],
    "ndarray.setfield": [(ARRAYS[0], 1, np.int32)],
    "ravel_multi_index": [(([1], [1]), (2, 2))],
    "unpackbits": [(np.array([3], dtype=np.uint8),)],
    "linalg.cross": [([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])],
    "typename": [("d",)],
    "random.shuffle": [(ARRAYS[4],), ([1, 2, 3],)],
    "random.multivariate_normal": [([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])],
}


def fresh(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    return list(map(fresh, value)) if isinstance(value, list) else value


def calls_of(name: str) -> Iterator[list[Any]]:
    for given in SPECIAL.get(name, ()):
        yield list(map(fresh, given))
    if name in SPECIAL:
        return
    if name.startswith("ndarray."):
        receivers: list[Any] = ARRAYS
    elif name.startswith("random.Generator."):
        receivers = [np.random.default_rng(0)]
    else:
        receivers = []
        for others in OTHERS:
            yield list(map(fresh, others))
        for array in ARRAYS:
            yield [[array.copy(), array.copy()]]
    for array in receivers or ARRAYS:
        for others in OTHERS:
            yield [fresh(array), *map(fresh, others)]
        if not name.startswith("random."):
            yield [fresh(array), fresh(array)]
            yield [fresh(array), [fresh(array)]]
        yield [fresh(array), fresh(ARRAYS[4])]


def fits(function: Any, arguments: list[Any]) -> bool:
    """Whether a function takes such arguments. It is called on copies: most do not fit, and looking at all that a call
    could do takes far longer than calling."""
    try:
        with np.errstate(), np.printoptions(), contextlib.redirect_stdout(io.StringIO()):
            function(*map(fresh, arguments))
    except MISFITS:
        return False
    return True


def test_every_row_keeps_what_it_claims(broken_claim: Broken) -> None:
    checked: Counter[str] = Counter()
    broken = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for target, row in ROWS.items():
            if row.behaviour is Behaviour.HARMLESS:
                continue
            for arguments in calls_of(target.removeprefix("numpy.")):
                if not fits(callable_of(target), arguments):
                    continue
                try:
                    complaint = broken_claim(row, arguments)
                except MISFITS:
                    continue
                checked[target] += 1
                if complaint:
                    broken.append(f"{target}{tuple(map(type, arguments))}: {complaint}")
                if complaint or checked[target] == 12:
                    break
    assert not broken, "\n".join(broken)
    unchecked = {target for target, row in ROWS.items() if row.behaviour is not Behaviour.HARMLESS} - set(checked)
    assert unchecked <= {
        *("numpy.busday_count", "numpy.busday_offset", "numpy.is_busday", "numpy.isnat", "numpy.datetime_as_string"),
        *("numpy.datetime_data", "numpy.from_dlpack", "numpy.mintypecode"),
    }


def parameters(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def test_the_places_of_out_are_numpy_s_own() -> None:
    wrong = []
    for target, row in ROWS.items():
        function = callable_of(target)
        if isinstance(function, np.ufunc):
            first = function.nin
            expected = {Option((place,), (place,)) for place in range(first, first + function.nout)}
            if not expected <= set(row.options):
                wrong.append(target)
            continue
        names = parameters(function)
        for name in ("out", "overwrite_input"):
            if name not in names:
                continue
            keyword_only = inspect.signature(function).parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            places = {place for option in row.options for place in option.places}
            if name not in places or (not keyword_only and names.index(name) not in places):
                wrong.append(f"{target}: {name} at {names.index(name)}")
    assert not wrong, "\n".join(wrong)


def test_out_is_written(broken_claim: Broken) -> None:
    square, out = ARRAYS[0], np.zeros((4, 4))
    assert broken_claim(ROWS["numpy.add"], [square, square, out.copy()]) is None
    assert broken_claim(ROWS["numpy.exp"], [square, out.copy()]) is None
    assert broken_claim(ROWS["numpy.exp"], [square], {"out": out.copy()}) is None
    assert broken_claim(ROWS["numpy.mean"], [square, 0, None, np.zeros(4)]) is None
    assert broken_claim(ROWS["numpy.median"], [square.copy(), 0], {"overwrite_input": True}) is None
    assert broken_claim(ROWS["numpy.nan_to_num"], [square.copy()], {"copy": False}) is None
    assert broken_claim(ROWS["numpy.ndarray.sum"], [square, 0, None, np.zeros(4)]) is None
    assert broken_claim(ROWS["numpy.array"], [square], {"copy": False}) is None


SHARED = [
    name
    for name in dir(np.ndarray)
    if not name.startswith("_") and callable(getattr(np.ndarray, name)) and known_method(name)
]


@pytest.mark.parametrize("name", SHARED)
def test_what_is_said_of_a_method_holds_for_arrays(broken_claim: Broken, name: str) -> None:
    """A method on an unknown receiver is known by its name alone: it may be an array."""
    row, checked = known_method(name), 0
    assert row is not None
    calls = [*calls_of(f"ndarray.{name}")]
    calls += [[ARRAYS[0].copy(), 0, np.zeros(4)], [ARRAYS[0].copy(), 0, None, np.zeros(4)]]
    for arguments in calls:
        try:
            complaint = broken_claim(row, arguments, function=getattr(np.ndarray, name))
        except MISFITS:
            continue
        checked += 1
        assert complaint in (None, "is a host call with these arguments"), (arguments, complaint)
    assert checked


@pytest.mark.parametrize("target", [target for target, row in ROWS.items() if row.random])
def test_random_rows_draw(target: str) -> None:
    """With the generator set back the same comes out, and the generator has moved."""
    function: Any = callable_of(target)
    name = target.removeprefix("numpy.")
    if ROWS[target].behaviour is Behaviour.HARMLESS:
        pytest.skip("sets the generator")
    own = name.startswith("random.Generator.")

    def draw(arguments: list[Any]) -> tuple[Any, Any]:
        np.random.seed(1)
        given = list(map(fresh, arguments))
        if own:
            given[0] = np.random.default_rng(1)
        result = function(*given)
        return result, repr(given[0].bit_generator.state) if own else np.random.get_state()[2]

    before = repr(np.random.default_rng(1).bit_generator.state) if own else 624
    for arguments in calls_of(name):
        try:
            first, after = draw(arguments)
        except MISFITS:
            continue
        if after != before:
            np.testing.assert_equal(draw(arguments)[0], first)
            return
    pytest.fail("never draws")
