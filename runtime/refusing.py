"""What stands for a value that a program cannot give: whatever is done with it raises, and says why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn


class Refusing:
    """Stands for a value that is not there: any use of it raises, as its `_refuse` says."""

    __slots__ = ()

    def _refuse(self) -> NoReturn:
        raise NotImplementedError

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_repr_") or name.startswith("_ipython_"):
            raise AttributeError(name)
        _refused(self)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        next(each for each in _parts((args, kwargs)) if isinstance(each, cls))._refuse()


def _parts(value: Any) -> Iterator[Any]:
    """A value, and what is in it where it is a tuple, list or dict."""
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    for each in inner:
        yield from _parts(each)


def _refused(self: Refusing, *args: object, **kwargs: object) -> NoReturn:
    """Raises as if from the line that used it."""
    try:
        self._refuse()
    except Exception as error:
        error.__traceback__ = None
        raise


_ARITHMETIC = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "matmul", "pow", "and", "or", "xor", "lshift",
    "rshift",
)  # fmt: skip
for _name in (
    *(f"__{kind}{name}__" for name in _ARITHMETIC for kind in ("", "r", "i")),
    *(f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "round", "hash")),
    *(f"__{name}__" for name in ("bool", "float", "int", "complex", "index", "str", "format", "bytes", "array")),
    *(f"__{name}__" for name in ("len", "iter", "next", "reversed", "contains", "getitem", "setitem", "delitem")),
    *(f"__{name}__" for name in ("call", "enter", "exit", "setattr", "delattr", "copy", "deepcopy", "reduce_ex")),
):
    setattr(Refusing, _name, _refused)
