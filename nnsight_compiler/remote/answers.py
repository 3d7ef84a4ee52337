"""JSON from a service, read strictly: it is not trusted to be what this protocol says."""

from __future__ import annotations

from typing import Any, final

from nnsight_compiler.files.document import parse
from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.remote.refusals import AnswerError, shown

_MISSING = object()


def parsed(body: bytes, url: str) -> dict[str, Any]:
    """The JSON object in an answer.

    Raises:
        AnswerError: it is none.
    """
    try:
        data = parse(body.decode())
    except UnicodeDecodeError:
        raise AnswerError(f"{url} answers with something that is no text") from None
    except FileError as error:
        raise AnswerError(f"{url} answers with something that cannot be read: {shown(error, 200)}") from None
    if type(data) is not dict:
        raise AnswerError(f"{url} answers with JSON that is no object")
    return data


@final
class Fields:
    """The fields of an answer, each of the type that it must have."""

    def __init__(self, data: object, url: str, what: str) -> None:
        if type(data) is not dict:
            raise AnswerError(f"{url} answers with {what} that is no object")
        self.data: dict[str, Any] = data
        self.url, self.what = url, what

    def _get(self, name: str, kind: type, word: str, otherwise: Any) -> Any:
        value = self.data.get(name)
        if value is None and otherwise is not _MISSING:
            return otherwise
        if type(value) is not kind:
            raise AnswerError(f"{self.url} answers with {self.what} whose {name!r} is no {word}")
        return value

    def text(self, name: str, otherwise: Any = _MISSING) -> str:
        """A string."""
        found: str = self._get(name, str, "text", otherwise)
        return found

    def number(self, name: str, otherwise: Any = _MISSING) -> int:
        """A whole number that is not negative."""
        found: int = self._get(name, int, "whole number", otherwise)
        if found is not otherwise and not 0 <= found < 2**62:
            raise AnswerError(f"{self.url} answers with {self.what} whose {name!r} is out of range")
        return found

    def object(self, name: str, otherwise: Any = _MISSING) -> dict[str, Any]:
        """An object."""
        found: dict[str, Any] = self._get(name, dict, "object", otherwise)
        return found

    def array(self, name: str, otherwise: Any = _MISSING) -> list[Any]:
        """An array."""
        found: list[Any] = self._get(name, list, "array", otherwise)
        return found
