"""The serial form of programs: versioned JSON, which nothing but data can come out of.

An op is an object with its kind, its fields and its span; a value is a string where it is used, and a string or
`[name, type]` where it is defined. Spans are `[file, line, column, end_line, end_column]`, the file an index into the
table `files`. Reading is strict: whatever does not say exactly one well-formed program raises `IRError`, with the path
to the fault. Nothing is imported or run.
"""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import fields
from functools import cache
from typing import Any, NoReturn, cast, get_args, get_origin
from typing import Literal as OneOf

from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.ops import ALL_OPS, Op, Parameter, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.schema import alternatives, schema
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.tokens import MAX_NESTING
from nnsight_compiler.ir.types import ANY, AnyType, Dimension, ModuleType, TensorType, Type
from nnsight_compiler.ir.values import UNBOUND, Literal, Module, Operand, Slice, Tuple, Unbound, Value
from nnsight_compiler.ir.verifier import verify

FORMAT = "nnsight-compiler-ir"
VERSION = 1

_OPS = {kind.__name__: kind for kind in ALL_OPS}
_CONSTANTS: dict[str, Operand] = {
    "None": Literal(None),
    "True": Literal(True),
    "False": Literal(False),
    "...": Literal(...),
    "unbound": UNBOUND,
}
_CONSTANT_NAMES = {constant: name for name, constant in _CONSTANTS.items()}
_MAX_BITS = 14_000
"""Of an integer: Python shows none of more than 4,300 decimal digits, which are 14,284 bits."""
_MAX_LENGTH = len("-0x") + _MAX_BITS // 4
_EXACT = 2**53
"""Integers up to here are the same in every reader of JSON; larger ones are written as text."""


def to_json(program: Program) -> dict[str, Any]:
    """The program as data that `json.dumps(…, allow_nan=False)` accepts."""
    writer = _Writer()
    return {"format": FORMAT, "version": VERSION, "program": writer.fields(program), "files": list(writer.files)}


def from_json(data: dict[str, Any]) -> Program:
    """The program that the data stands for, verified. Raises `IRError` with the path to what is wrong."""
    reader = _Reader()
    reader.keys(data, ("format", "version", "program", "files"), "")
    if data["format"] != FORMAT:
        reader.fail("format", f"expected {FORMAT!r}")
    if type(data["version"]) is not int or data["version"] != VERSION:
        reader.fail("version", f"this is version {data['version']!r:.20}, and only {VERSION} is known")
    reader.files = [reader.string(file, f"files[{i}]") for i, file in enumerate(reader.array(data["files"], "files"))]
    program = reader.program(data["program"], "program", 0)
    verify(program)
    return program


def literal_from_json(key: str, held: object, where: str) -> Literal:
    """The constant of a field that `literal_to_json` wrote. Raises `IRError` with the path to what is wrong."""
    if key == "constant" and type(held) is str and held in _CONSTANTS:
        found = _CONSTANTS[held]
        if isinstance(found, Literal):
            return found
    return Literal(_Reader().literal(key, held, where))


@cache
def _names(kind: type) -> tuple[tuple[str, bool], ...]:
    """The fields of a kind of record, and whether each defines values."""
    names = [item.name for item in fields(kind)]
    return tuple((name, name in ("result", "results") or (name == "value" and kind is Parameter)) for name in names)


class _Writer:
    def __init__(self) -> None:
        self.files: dict[str, int] = {}

    def fields(self, held: Any) -> dict[str, Any]:
        """The fields of a record, and its span."""
        written: dict[str, Any] = {}
        for name, defines in _names(type(held)):  # type: ignore[arg-type]  # classes can be hashed
            field = getattr(held, name)
            if isinstance(field, Span):
                file = self.files.setdefault(field.file, len(self.files))
                written["span"] = [file, field.line, field.column, field.end_line, field.end_column]
            elif defines:
                written[name] = self.definitions(field)
            else:
                written[name] = self.any(field)
        return written

    def definitions(self, held: Value | tuple[Value, ...]) -> Any:
        if isinstance(held, tuple):
            return [self.definitions(value) for value in held]
        return held.name if held.type == ANY else [held.name, _write_type(held.type)]

    def any(self, held: object) -> Any:
        match held:
            case None | bool() | int() | str():
                return held
            case tuple():
                return [self.any(part) for part in held]
            case Value() | Literal() | Unbound() | Module() | Slice() | Tuple():
                return self.operand(held)
            case Region(parameters=parameters, ops=ops):
                return {"parameters": self.definitions(parameters), "ops": [self.any(op) for op in ops]}
            case Op():
                return {"op": type(held).__name__, **self.fields(held)}
            case _:
                return self.fields(held)

    def operand(self, operand: Operand) -> Any:
        match operand:
            case Value(name=name):
                return name
            case Literal() | Unbound():
                return literal_to_json(operand)
            case Module(model=model, path=path):
                return {"module": [model.name, path]}
            case Slice(lower=lower, upper=upper, step=step):
                return {"slice": [self.operand(part) for part in (lower, upper, step)]}
            case Tuple(parts=parts):
                return {"tuple": [self.operand(part) for part in parts]}


def literal_to_json(literal: Literal | Unbound) -> dict[str, Any]:
    """A constant as an object with one field, which `literal_from_json` reads."""
    if literal in _CONSTANT_NAMES:
        return {"constant": _CONSTANT_NAMES[literal]}
    assert isinstance(literal, Literal)
    match literal.value:
        case int(value):
            if value.bit_length() > _MAX_BITS:
                raise IRError(f"an integer of {value.bit_length()} bits is too large: at most {_MAX_BITS} are written")
            return {"int": value if abs(value) <= _EXACT else hex(value)}
        case float(value):
            return {"float": _write_float(value)}
        case complex(real=real, imag=imag):
            return {"complex": [_write_float(real), _write_float(imag)]}
        case str(value):
            return {"str": value}
        case bytes(value):
            return {"bytes": base64.b64encode(value).decode("ascii")}
        case value:
            raise IRError(f"{value!r:.80} is no literal")


def _write_float(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)


def _write_type(type: Type) -> dict[str, Any]:
    match type:
        case AnyType():
            return {"any": None}
        case ModuleType(class_name=class_name):
            return {"module": class_name}
        case TensorType(dtype=dtype, shape=shape):
            axes = None if shape is None else [[dimension.size, dimension.axis] for dimension in shape]
            return {"tensor": [dtype, axes]}


class _Reader:
    def __init__(self) -> None:
        self.files: list[str] = []
        self.values: dict[str, Value] = {}

    def fail(self, path: str, reason: str) -> NoReturn:
        raise IRError(f"at {path or 'the top'}: {reason}")

    # --- plain data ---

    def keys(self, data: object, expected: tuple[str, ...], path: str) -> dict[str, Any]:
        if type(data) is not dict:
            self.fail(path, "expected an object")
        for key in data:
            if key not in expected:
                self.fail(path, f"unknown field {key!r:.80}")
        for key in expected:
            if key not in data:
                self.fail(path, f"the field {key!r} is missing")
        return data

    def array(self, data: object, path: str, length: int | None = None) -> list[Any]:
        if type(data) is not list or (length is not None and len(data) != length):
            self.fail(path, "expected an array" + ("" if length is None else f" of {length}"))
        return data

    def string(self, data: object, path: str) -> str:
        if type(data) is not str:
            self.fail(path, "expected a string")
        return data

    def whole(self, data: object, path: str) -> int:
        if type(data) is not int:
            self.fail(path, "expected a whole number")
        return data

    def only(self, data: object, path: str) -> tuple[str, Any]:
        """The key and the value of an object with one field."""
        if type(data) is not dict or len(data) != 1:
            self.fail(path, "expected a value's name, or an object with one field")
        ((key, held),) = data.items()
        return self.string(key, path), held

    # --- records, by their annotations ---

    def record(self, data: object, kind: type, path: str, depth: int) -> Any:
        """A dataclass from its fields."""
        spanned = issubclass(kind, Op | Program)
        tag = ("op",) if issubclass(kind, Op) else ()
        names = (*tag, *schema(kind), *(("span",) if spanned else ()))
        held = self.keys(data, names, path)
        made = {}
        for name, hint in schema(kind).items():
            defines = name in ("result", "results") or (name == "value" and kind.__name__ == "Parameter")
            made[name] = self.field(held[name], hint, f"{path}.{name}", depth, defines)
        if spanned:
            made["span"] = self.span(held["span"], f"{path}.span")
        return kind(**made)

    def field(self, data: object, hint: Any, path: str, depth: int, defines: bool = False) -> Any:
        choices = alternatives(hint)
        if data is None:
            if type(None) not in choices:
                self.fail(path, "this may not be null")
            return None
        choices = tuple(choice for choice in choices if choice is not type(None))
        if Value in choices:
            if defines:
                return self.definition(data, path)
            return self.operand(data, path)
        if str in choices and len(choices) > 1 and type(data) is str:
            return data
        choice = choices[-1]
        if get_origin(choice) is tuple:
            part = get_args(choice)[0]
            return tuple(
                self.field(each, part, f"{path}[{i}]", depth, defines) for i, each in enumerate(self.array(data, path))
            )
        if get_origin(choice) is OneOf:
            if not any(type(data) is type(word) and data == word for word in get_args(choice)):
                self.fail(path, f"expected one of {', '.join(map(repr, get_args(choice)))}")
            return data
        if choice in (str, int, bool):
            if type(data) is not choice:
                self.fail(path, f"expected a value of type {choice.__name__}")
            return data
        if choice is Region:
            return self.region(data, path, depth + 1)
        if choice is Program:
            return self.program(data, path, depth + 1)
        if choice is Module:
            module = self.operand(data, path)
            return module if isinstance(module, Module) else self.fail(path, "expected a module")
        return self.record(data, choice, path, depth)

    def program(self, data: object, path: str, depth: int) -> Program:
        """A program. Its values are its own."""
        outer, self.values = self.values, {}
        found = cast(Program, self.record(data, Program, path, depth))
        self.values = outer
        return found

    def region(self, data: object, path: str, depth: int) -> Region:
        if depth > MAX_NESTING:
            self.fail(path, f"regions are nested more than {MAX_NESTING} deep")
        held = self.keys(data, ("parameters", "ops"), path)
        parameters = self.array(held["parameters"], f"{path}.parameters")
        values = tuple(self.definition(each, f"{path}.parameters[{i}]") for i, each in enumerate(parameters))
        found = []
        for number, each in enumerate(self.array(held["ops"], f"{path}.ops")):
            where = f"{path}.ops[{number}]"
            name = each.get("op") if type(each) is dict else None
            if type(name) is not str or name not in _OPS:
                self.fail(where, f"{name!r:.80} is no op")
            found.append(self.record(each, _OPS[name], where, depth))
        return Region(values, tuple(found))

    def span(self, data: object, path: str) -> Span:
        file, *place = (self.whole(each, path) for each in self.array(data, path, 5))
        if not 0 <= file < len(self.files) or min(place) < 0:
            self.fail(path, "no such place")
        return Span(self.files[file], *place)

    # --- values and operands ---

    def definition(self, data: object, path: str) -> Value:
        if type(data) is list:
            name, written = self.array(data, path, 2)
            value = Value(self.string(name, path), self.type(written, path))
        else:
            value = Value(self.string(data, path))
        self.values[value.name] = value
        return value

    def use(self, data: object, path: str) -> Value:
        name = self.string(data, path)
        if name not in self.values:
            self.fail(path, f"the value {name!r:.80} is not defined before it is used")
        return self.values[name]

    def operand(self, data: object, path: str, depth: int = 1) -> Operand:
        if depth > MAX_NESTING:
            self.fail(path, f"operands are nested more than {MAX_NESTING} deep")
        if type(data) is str:
            return self.use(data, path)
        key, held = self.only(data, path)
        match key:
            case "module":
                model, module = self.array(held, path, 2)
                return Module(self.use(model, path), self.string(module, path))
            case "slice":
                return Slice(*(self.operand(part, f"{path}.slice", depth + 1) for part in self.array(held, path, 3)))
            case "tuple":
                parts = enumerate(self.array(held, path))
                return Tuple(tuple(self.operand(part, f"{path}.tuple[{i}]", depth + 1) for i, part in parts))
            case "constant" if type(held) is str and held in _CONSTANTS:
                return _CONSTANTS[held]
            case _:
                return Literal(self.literal(key, held, path))

    def literal(self, key: str, held: object, path: str) -> object:
        try:
            match key, held:
                case "int", int() if type(held) is int:
                    return held
                case "int", str() if (
                    held.startswith(("0x", "-0x")) and "_" not in held and len(held) <= _MAX_BITS // 4 + 3
                ):
                    return int(held, 16)
                case "float", float() | int() | str():
                    return self.float(held, path)
                case "complex", [real, imag]:
                    return complex(self.float(real, path), self.float(imag, path))
                case "str", str():
                    return held
                case "bytes", str():
                    return base64.b64decode(held.encode("ascii"), validate=True)
        except (ValueError, OverflowError, binascii.Error):
            pass
        self.fail(path, f"{key!r:.20} does not hold {held!r:.80}")

    def float(self, data: object, path: str) -> float:
        if type(data) is str and data in ("nan", "inf", "-inf"):
            return float(data)
        if type(data) not in (float, int) or not math.isfinite(cast(float, data)):
            self.fail(path, "expected a number, 'nan', 'inf' or '-inf'")
        return float(cast(float, data))

    def type(self, data: object, path: str) -> Type:
        key, held = self.only(data, path)
        match key:
            case "module":
                return ModuleType(self.string(held, path))
            case "tensor":
                dtype, shape = self.array(held, path, 2)
                return TensorType(
                    None if dtype is None else self.string(dtype, path),
                    None if shape is None else tuple(self.dimension(each, path) for each in self.array(shape, path)),
                )
            case _:
                self.fail(path, f"{key!r:.80} is no type")

    def dimension(self, data: object, path: str) -> Dimension:
        size, axis = self.array(data, path, 2)
        return Dimension(
            None if size is None else self.whole(size, path), None if axis is None else self.string(axis, path)
        )
