"""numpy's rows of the table of known calls, written by hand: numpy itself is looked up only where the user imported it.

Arrays are taken to hold numbers; `numpy.array`, which may be given objects, is said to hold what it is given. A
method has a row here where the class of its receiver is known; elsewhere it is known by its name alone, like any
method, and what is said of that name holds for arrays too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from nnsight_compiler.passes.behaviour import EVERY, OUT, Behaviour, KnownCall, Option, Place, words

_ELEMENTWISE = {
    1: "abs absolute acos acosh arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh bitwise_count "
    "bitwise_invert bitwise_not cbrt ceil conj conjugate cos cosh deg2rad degrees exp exp2 expm1 fabs floor "
    "invert isfinite isinf isnan isnat log log10 log1p log2 logical_not negative positive rad2deg radians "
    "reciprocal rint sign signbit sin sinh spacing sqrt square tan tanh trunc frexp modf",
    2: "add arctan2 atan2 bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor copysign divide "
    "divmod equal float_power floor_divide fmax fmin fmod gcd greater greater_equal heaviside hypot lcm ldexp "
    "left_shift less less_equal logaddexp logaddexp2 logical_and logical_or logical_xor matmul matvec maximum "
    "minimum mod multiply nextafter not_equal pow power remainder right_shift subtract true_divide vecdot vecmat",
}
"""Functions of numbers, by how many arguments they take: `out` may follow these."""
_TWO_RESULTS = ("frexp", "modf", "divmod")

_PURE = """
    append arange argpartition argsort argwhere average bartlett bincount blackman block busday_count busday_offset
    column_stack convolve copy corrcoef correlate cov cross cumulative_prod cumulative_sum datetime_as_string
    delete digitize ediff1d empty empty_like extract eye flatnonzero full full_like geomspace hamming hanning i0
    identity indices inner insert interp intersect1d is_busday isclose iscomplex isin isreal kaiser kron lexsort
    linspace logspace ones ones_like packbits pad partition poly polyadd polymul polysub polyval ravel_multi_index
    repeat resize roll roots searchsorted select setdiff1d setxor1d sinc sort sort_complex take_along_axis
    tensordot tile trapezoid tri tril triu union1d unique_values unpackbits vander vdot zeros zeros_like bool
    float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 complex64 complex128 linalg.cholesky
    linalg.cond linalg.cross linalg.det linalg.eigvals linalg.eigvalsh linalg.inv linalg.matmul linalg.matrix_norm
    linalg.matrix_rank linalg.multi_dot linalg.norm linalg.outer linalg.pinv linalg.solve linalg.svdvals
    linalg.tensordot linalg.tensorinv linalg.tensorsolve linalg.trace linalg.vecdot linalg.vector_norm fft.fft
    fft.fftfreq fft.fftshift fft.hfft fft.ifft fft.ifftshift fft.ihfft fft.irfft fft.rfft fft.rfftfreq nonzero
    where unique unique_all unique_counts unique_inverse unravel_index diag_indices diag_indices_from gradient
    polydiv polyfit tril_indices tril_indices_from triu_indices triu_indices_from mask_indices einsum_path
    linalg.eig linalg.eigh linalg.lstsq linalg.qr linalg.slogdet linalg.svd errstate printoptions
    random.SeedSequence
"""
_SEVERAL = frozenset(
    words("""
    nonzero where unique unique_all unique_counts unique_inverse unravel_index diag_indices diag_indices_from gradient
    polydiv polyfit tril_indices tril_indices_from triu_indices triu_indices_from
    mask_indices einsum_path linalg.eig linalg.eigh linalg.lstsq linalg.qr linalg.slogdet linalg.svd errstate
    printoptions average random.SeedSequence
    """)
)
"""Of these, the ones whose result is not one array."""

_WRITING_OUT = {
    "all": 2, "amax": 2, "amin": 2, "any": 2, "argmax": 2, "argmin": 2, "around": 2, "choose": 2, "clip": 3,
    "compress": 3, "concat": 2, "concatenate": 2, "cumprod": 3, "cumsum": 3, "dot": 2, "fix": 1, "isneginf": 1,
    "isposinf": 1, "max": 2, "mean": 3, "median": 2, "min": 2, "nanargmax": 2, "nanargmin": 2, "nancumprod": 3,
    "nancumsum": 3, "nanmax": 2, "nanmean": 3, "nanmedian": 2, "nanmin": 2, "nanpercentile": 3, "nanprod": 3,
    "nanquantile": 3, "nanstd": 3, "nansum": 3, "nanvar": 3, "outer": 2, "percentile": 3, "prod": 3, "ptp": 2,
    "quantile": 3, "round": 2, "stack": 2, "std": 3, "sum": 3, "take": 3, "trace": 5, "var": 3,
    "busday_count": 5, "busday_offset": 6, "is_busday": 4, "linalg.multi_dot": 1,
}  # fmt: skip
_WRITING_OUT |= {f"fft.{name}": 4 for name in words("fft hfft ifft ihfft irfft rfft")}
"""Pure functions that may be given the array to write to, and its place."""

_OVERWRITING = {
    "median": 3, "nanmedian": 3, "percentile": 4, "quantile": 4, "nanpercentile": 4, "nanquantile": 4,
}  # fmt: skip
"""The place of `overwrite_input`, by which they may sort their first argument in place."""

_VIEW = """
    angle diff histogram_bin_edges polyder polyint ascontiguousarray asfortranarray asmatrix astype broadcast_to
    diag diagflat diagonal einsum expand_dims flip fliplr flipud frombuffer from_dlpack imag linalg.diagonal
    linalg.matrix_power linalg.matrix_transpose matrix_transpose moveaxis permute_dims ravel real real_if_close
    require reshape rollaxis rot90 squeeze swapaxes transpose
"""
_VIEW_OUT = "fft.fft2 fft.fftn fft.ifft2 fft.ifftn fft.irfft2 fft.irfftn fft.rfft2 fft.rfftn"
"""Over no axes they give back their argument; the fifth may be `out`."""
_VIEWS = """
    array asanyarray asarray asarray_chkfinite array_split atleast_1d atleast_2d atleast_3d broadcast_arrays dsplit
    hsplit histogram histogram2d histogramdd ix_ meshgrid trim_zeros split unstack vsplit dtype fromiter
    random.default_rng
"""
"""Functions whose result may be a view of an argument, or be one: one array; several, or what may hold objects."""

_SCALAR = """
    allclose array_equal array_equiv base_repr binary_repr broadcast_shapes can_cast common_type count_nonzero
    datetime_data finfo format_float_positional format_float_scientific iinfo iscomplexobj isdtype isfortran
    isrealobj isscalar issubdtype iterable may_share_memory min_scalar_type mintypecode ndim promote_types
    result_type shape shares_memory size typename
"""

_MUTATES: dict[str, tuple[Place, ...]] = {
    "copyto": (0, "dst"),
    "fill_diagonal": (0, "a"),
    "place": (0, "arr"),
    "put": (0, "a"),
    "put_along_axis": (0, "arr"),
    "putmask": (0, "a"),
}

_SET = "set_printoptions seterr setbufsize"
_SHOWN = "get_printoptions geterr getbufsize"

_DRAWS = """
    beta binomial bytes chisquare dirichlet exponential f gamma geometric gumbel hypergeometric laplace logistic
    lognormal logseries multinomial multivariate_normal negative_binomial noncentral_chisquare noncentral_f normal
    pareto permutation poisson power random rayleigh standard_cauchy standard_exponential standard_gamma
    standard_normal standard_t triangular uniform vonmises wald weibull zipf
"""
_OLD_DRAWS = "rand randint randn random_sample ranf sample"
_GENERATOR_DRAWS = "integers permuted multivariate_hypergeometric"
_GENERATOR_OUT = {
    "random": 3, "standard_exponential": 4, "standard_gamma": 4, "standard_normal": 3,
}  # fmt: skip

_ARRAY_PURE = "argpartition argsort copy flatten repeat searchsorted"
_ARRAY_OUT = {
    "all": 2, "any": 2, "argmax": 2, "argmin": 2, "choose": 2, "clip": 3, "compress": 3, "cumprod": 3, "cumsum": 3,
    "dot": 2, "max": 2, "mean": 3, "min": 2, "prod": 3, "round": 2, "std": 3, "sum": 3, "take": 3, "trace": 5, "var": 3,
}  # fmt: skip
_ARRAY_VIEW = "astype diagonal getfield ravel reshape squeeze swapaxes transpose view"
_ARRAY_SCALAR = "dumps item tobytes"
_ARRAY_MUTATES = "fill partition put resize setfield setflags sort"


@cache
def numpy_rows() -> dict[str, KnownCall]:
    """All rows of numpy's, by name on the wire."""
    return {row.target: row for row in (*_functions(), *_random(), *_arrays())}


def _functions() -> Iterator[KnownCall]:
    for count, names in _ELEMENTWISE.items():
        for name in words(names):
            places: tuple[Place, ...] = (count, "out")
            if name in _TWO_RESULTS:
                places = (count, count + 1, "out")
            written = tuple(Option((place,), (place,)) for place in places)
            yield KnownCall(f"numpy.{name}", Behaviour.PURE, leaf=name not in _TWO_RESULTS, options=written)
    for name in words(_PURE):
        if name not in _WRITING_OUT:
            yield KnownCall(f"numpy.{name}", Behaviour.PURE, leaf=name not in _SEVERAL, options=(OUT,))
    for name, position in _WRITING_OUT.items():
        options = [Option((position,), (position,)), OUT]
        if name in _OVERWRITING:
            options.append(Option((_OVERWRITING[name], "overwrite_input"), (0, "a")))
        yield KnownCall(f"numpy.{name}", Behaviour.PURE, leaf=True, options=tuple(options))
    # With `copy=False` it writes its argument, and gives it back.
    yield KnownCall("numpy.nan_to_num", Behaviour.MUTATES, (0, "x"), (0, "x"), leaf=True)
    for name in words(_VIEW):
        yield KnownCall(f"numpy.{name}", Behaviour.VIEW, aliases=EVERY, leaf=True, options=(OUT,))
    for name in words(_VIEW_OUT):
        yield KnownCall(f"numpy.{name}", Behaviour.VIEW, aliases=EVERY, leaf=True, options=(Option((4,), (4,)), OUT))
    for name in words(_VIEWS):
        yield KnownCall(f"numpy.{name}", Behaviour.VIEW, aliases=EVERY)
    for name in words(_SCALAR):
        yield KnownCall(f"numpy.{name}", Behaviour.PURE, scalar=True, leaf=True)
    for name, written_to in _MUTATES.items():
        yield KnownCall(f"numpy.{name}", Behaviour.MUTATES, written_to, leaf=True)
    for name in words(_SET):
        yield KnownCall(f"numpy.{name}", Behaviour.HARMLESS, mode=True)
    for name in words(_SHOWN):
        yield KnownCall(f"numpy.{name}", Behaviour.HARMLESS)


def _random() -> Iterator[KnownCall]:
    for name in words(_DRAWS + _OLD_DRAWS):
        yield KnownCall(f"numpy.random.{name}", Behaviour.PURE, random=True, leaf=True)
    yield KnownCall("numpy.random.choice", Behaviour.VIEW, aliases=EVERY, random=True)
    yield KnownCall("numpy.random.shuffle", Behaviour.CONTAINER, (0, "x"), random=True)
    for name in words("seed get_state set_state"):
        yield KnownCall(f"numpy.random.{name}", Behaviour.HARMLESS, random=True)
    for name in words(_DRAWS + _GENERATOR_DRAWS):
        place = _GENERATOR_OUT.get(name)
        options = (OUT,) if place is None else (OUT, Option((place,), (place,)))
        yield KnownCall(
            f"numpy.random.Generator.{name}", Behaviour.MUTATES, (0,), random=True, leaf=True, options=options
        )
    yield KnownCall("numpy.random.Generator.choice", Behaviour.MUTATES, (0,), EVERY, random=True)
    yield KnownCall("numpy.random.Generator.shuffle", Behaviour.MUTATES, (0, 1, "x"), random=True)


def _arrays() -> Iterator[KnownCall]:
    method = "numpy.ndarray."
    for name in words(_ARRAY_PURE):
        yield KnownCall(method + name, Behaviour.PURE, leaf=True)
    for name, position in _ARRAY_OUT.items():
        yield KnownCall(method + name, Behaviour.PURE, leaf=True, options=(Option((position,), (position,)), OUT))
    for name in words("nonzero tolist"):
        yield KnownCall(method + name, Behaviour.PURE)
    for name in words(_ARRAY_VIEW):
        yield KnownCall(method + name, Behaviour.VIEW, aliases=(0,), leaf=True)
    for name in words("conj conjugate"):
        yield KnownCall(method + name, Behaviour.VIEW, aliases=EVERY, leaf=True, options=(Option((1,), (1,)), OUT))
    for name in words(_ARRAY_SCALAR):
        yield KnownCall(method + name, Behaviour.PURE, scalar=True, leaf=True)
    for name in words(_ARRAY_MUTATES):
        yield KnownCall(method + name, Behaviour.MUTATES, (0,), leaf=True)
    swapped = Option((1, "inplace"), (0,))
    yield KnownCall(method + "byteswap", Behaviour.PURE, leaf=True, options=(swapped,))
