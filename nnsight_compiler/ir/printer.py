"""The text form of programs: one op a line, two spaces of indentation a region, source lines as comments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, assert_never, final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Argument, Element, FormatPart, Op, Parameter, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import NOWHERE, Span
from nnsight_compiler.ir.syntax import BLOCKS, FORMS, RESERVED_TYPES, SHORT_DTYPES, Form, Hole
from nnsight_compiler.ir.tokens import spell_literal, spell_module, spell_name, spell_text, spell_value
from nnsight_compiler.ir.traverse import defined
from nnsight_compiler.ir.types import ANY, AnyType, Dimension, ModuleType, TensorType, Type
from nnsight_compiler.ir.values import NONE, Literal, Module, Operand, Slice, Tuple, Unbound, Value

_FORMS: dict[type[Op], list[Form]] = {}
for _each in FORMS:
    _FORMS.setdefault(_each.op, []).append(_each)
_FARTHEST_COMMENT = 88


@final
@dataclass(frozen=True, slots=True)
class Line:
    """A line of a program's text, and the line of the source that it stands for. `new`: the line before had another."""

    text: str
    file: str
    number: int
    new: bool

    @property
    def comment(self) -> str:
        return f"# {spell_file(self.file)}:{self.number}" if self.new else ""


def print_program(program: Program) -> str:
    """The program as text, which `parse_program` reads back to an equal program."""
    return _text(program_lines(program))


def program_lines(program: Program) -> list[Line]:
    """The lines of the program's text."""
    lines = _Lines()
    lines.program(program, 0)
    return lines.lines


def print_region(region: Region) -> str:
    """The ops of a region, as text."""
    lines = _Lines()
    lines.region(region, 0)
    return _text(lines.lines)


def print_op(op: Op) -> str:
    """The op's own line, without its regions."""
    if isinstance(op, ops.Operator):
        text = _results(op) + _operator(op)
    else:
        form = next(form for form in _FORMS[type(op)] if all(getattr(op, k) == v for k, v in form.fixed.items()))
        text = ("" if form.names_results else _results(op)) + "".join(_fill(part, op) for part in form.parts)
    return text + _types(defined(op))


class _Lines:
    """Lines of text with the source line that each stands for."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.place = (NOWHERE.file, NOWHERE.line)

    def add(self, depth: int, text: str, span: Span | None = None) -> None:
        new = span is not None and (span.file, span.line) != self.place
        if span is not None:
            self.place = (span.file, span.line)
        self.lines.append(Line("  " * depth + text, *self.place, new))

    def program(self, program: Program, depth: int) -> None:
        self.add(depth, _program_header(program), program.span)
        self.region(program.body, depth + 1)

    def region(self, region: Region, depth: int) -> None:
        for op in region.ops:
            self.add(depth, print_op(op), op.span)
            if isinstance(op, ops.Stage):
                self.program(op.program, depth + 1)
            for label, name in BLOCKS.get(type(op), ()):
                self.block(op, label, getattr(op, name), depth)

    def block(self, op: Op, label: str, held: Region | tuple[ops.Handler, ...] | None, depth: int) -> None:
        match held:
            case None:
                return
            case tuple():
                for handler in held:
                    self.block(op, "except", handler.types, depth)
                    self.block(op, label, handler.body, depth)
            case Region(parameters=parameters):
                if isinstance(op, ops.If) and label == "else" and held == Region():
                    return
                if label:
                    self.add(depth, f"{label} {', '.join(map(_definition, parameters))}".rstrip())
                self.region(held, depth + 1)


def _text(lines: list[Line]) -> str:
    column = min(max((len(line.text) for line in lines if line.new), default=0), _FARTHEST_COMMENT)
    return "".join(f"{line.text.ljust(column)}  {line.comment}\n" if line.new else f"{line.text}\n" for line in lines)


def spell_file(file: str) -> str:
    """A file's name as it stands in a comment: quoted where a reader could not tell where it ends."""
    plain = file.isprintable() and file and not set(file) & set(" '\"")
    return file if plain else repr(file)


def _program_header(program: Program) -> str:
    missing = [Literal(...) for parameter in program.parameters if parameter.optional]
    text = f"{program.kind} {spell_name(program.name)}{_signature(program.parameters, missing)}"
    if program.target:
        text += f"  for {spell_text(program.target)}"
    for word, texts in (("given", program.given), ("after", program.passes), ("exports", program.exports)):
        if texts:
            text += f"  {word} {', '.join(map(spell_text, texts))}"
    return text


def print_type(type: Type) -> str:
    """A type: `any`, `f32[rows=1, tokens=7, 768]`, `module GPT2Block`."""
    match type:
        case AnyType():
            return "any"
        case ModuleType(class_name=class_name):
            return f"module {spell_name(class_name)}"
        case TensorType(dtype=dtype, shape=shape):
            word = "tensor" if dtype is None else SHORT_DTYPES.get(dtype, dtype)
            if dtype is not None and dtype not in SHORT_DTYPES and dtype in RESERVED_TYPES:
                word = repr(dtype)
            elif dtype is not None:
                word = spell_name(word)
            return word if shape is None else f"{word}[{', '.join(map(_dimension, shape))}]"
        case _:
            assert_never(type)


def _dimension(dimension: Dimension) -> str:
    match dimension:
        case Dimension(size=None, axis=None):
            return "?"
        case Dimension(size=None, axis=str(axis)):
            return spell_name(axis)
        case Dimension(size=size, axis=None):
            return str(size)
        case _:
            return f"{spell_name(dimension.axis or '')}={dimension.size}"


def _definition(value: Value) -> str:
    return spell_value(value.name) + (f": {print_type(value.type)}" if value.type != ANY else "")


def _types(values: tuple[Value, ...]) -> str:
    if all(value.type == ANY for value in values):
        return ""
    return f" : {', '.join(print_type(value.type) for value in values)}"


def _results(op: Op) -> str:
    names = [spell_value(value.name) for value in defined(op)]
    if isinstance(op, ops.Unpack) and 0 <= op.star < len(names):
        names[op.star] = f"*{names[op.star]}"
    return f"{', '.join(names)} = " if names else ""


def print_operand(operand: Operand) -> str:
    """An operand as it stands in an op."""
    match operand:
        case Value(name=name):
            return spell_value(name)
        case Literal() | Unbound():
            return spell_literal(operand)
        case Module(model=model, path=path):
            return spell_module(model.name, path)
        case Slice():
            return f"slice({_bounds(operand)})"
        case Tuple(parts=parts):
            return f"({_joined(map(print_operand, parts))}{',' if len(parts) == 1 else ''})"
        case _:
            assert_never(operand)


def _bounds(part: Slice) -> str:
    lower, upper, step = ("" if each == NONE else print_operand(each) for each in (part.lower, part.upper, part.step))
    return f"{lower}:{upper}" + (f":{step}" if step else "")


def _index_part(part: Operand) -> str:
    return _bounds(part) if isinstance(part, Slice) else print_operand(part)


def _index(index: Operand) -> str:
    if isinstance(index, Tuple) and index.parts:
        return _joined(map(_index_part, index.parts)) + ("," if len(index.parts) == 1 else "")
    return _index_part(index)


def _operator(op: ops.Operator) -> str:
    sign = op.operator + ("=" if op.in_place else "")
    texts = [print_operand(operand) for operand in op.operands]
    return f"{sign} {texts[0]}" if len(texts) == 1 else f" {sign} ".join(texts)


def _argument(argument: Argument) -> str:
    keyword = "" if argument.keyword is None else f"{spell_name(argument.keyword)}="
    return f"{argument.star}{keyword}{print_operand(argument.value)}"


def _element(element: Element, star: str = "*") -> str:
    if element.key is not None:
        return f"{print_operand(element.key)}: {print_operand(element.value)}"
    return f"{star if element.starred else ''}{print_operand(element.value)}"


def _part(part: str | FormatPart) -> str:
    if isinstance(part, str):
        return repr(part)
    conversion = f"!{part.conversion}" if part.conversion else ""
    specification = "" if part.specification is None else f":{print_operand(part.specification)}"
    return f"{{{print_operand(part.value)}{conversion}{specification}}}"


def _signature(parameters: tuple[Parameter, ...], defaults: Iterable[Operand]) -> str:
    """Parameters as Python writes them, with `/` and `*` where their kinds need it."""
    texts: list[str] = []
    remaining = iter(defaults)
    for number, parameter in enumerate(parameters):
        before = parameters[number - 1].kind if number else None
        if before == "positional_only" and parameter.kind != "positional_only":
            texts.append("/")
        if parameter.kind == "keyword_only" and before not in ("keyword_only", "var_positional"):
            texts.append("*")
        star = {"var_positional": "*", "var_keyword": "**"}.get(parameter.kind, "")
        default = next(remaining, None) if parameter.optional else None
        sign = "=" if parameter.value.type == ANY else " = "
        texts.append(star + _definition(parameter.value) + ("" if default is None else sign + print_operand(default)))
    if parameters and parameters[-1].kind == "positional_only":
        texts.append("/")
    return f"({_joined(texts)})"


def _carry(body: Region, initial: tuple[Operand, ...], skipped: int = 0) -> str:
    pairs = zip(body.parameters[skipped:], initial, strict=False)
    texts = [f"{_definition(value)} = {print_operand(operand)}" for value, operand in pairs]
    return f" carry {_joined(texts)}" if texts else ""


def _stops(stops: bool, body: Region) -> str:
    """Where a forward ends that does not run to its end."""
    if not stops:
        return ""
    last = body.ops[-1] if body.ops else None
    if not isinstance(last, ops.At):  # the verifier refuses it, and shows it
        return " stops"
    call = "" if last.call is None else f" call {last.call}"
    return f" stops after {print_operand(last.module)} {last.port}{call}"


def _item(body: Region) -> str:
    return _joined(map(_definition, body.parameters[:1]))


_joined = ", ".join

_HOLES: dict[str, Callable[..., str]] = {
    "after": lambda after: f" after {after}" if after else "",
    "arguments": lambda arguments: f"({_joined(map(_argument, arguments))})",
    "as": lambda target: "" if target is None else f" as {spell_text(target)}",
    "base": lambda base, replays: (
        "" if base is None else f" from {print_operand(base)} replaying {print_operand(replays)}"
    ),
    "bounds": lambda start, stop: _bounds(Slice(start, stop)),
    "call": lambda call: "" if call is None else f" call {call}",
    "carry": _carry,
    "cause": lambda cause: "" if cause is None else f" from {print_operand(cause)}",
    "define": lambda value: spell_value(value.name),
    "elements": lambda elements: _joined(map(_element, elements)),
    "entries": lambda elements: _joined(_element(element, "**") for element in elements),
    "in": lambda operand: "" if operand is None else f" in {print_operand(operand)}",
    "index": _index,
    "item": _item,
    "leaf": lambda leaf: "" if leaf is None else f" leaf {leaf}",
    "loop": lambda body, iterable, initial: (
        f"{_item(body)} in {print_operand(iterable)}{_carry(body, initial, skipped=1)}"
    ),
    "maybe": lambda operand: "" if operand is None else f" {print_operand(operand)}",
    "name": spell_name,
    "operand": print_operand,
    "operands": lambda operands: f" {_joined(map(print_operand, operands))}".rstrip(),
    "owner": lambda operand: print_operand(operand) + (" " if isinstance(operand, Module) else ""),
    "parts": lambda parts: f" {_joined(map(_part, parts))}".rstrip(),
    "rows": lambda rows: "" if rows is None else f" of {print_operand(rows)}",
    "step": lambda step: "" if step is None else f" step {print_operand(step)}",
    "stops": _stops,
    "relative": lambda level, module: "." * level + (spell_text(module) if module else ""),
    "signature": _signature,
    "sparing": lambda models: f" sparing {_joined(map(print_operand, models))}" if models else "",
    "text": spell_text,
    "word": str,
}
"""How the fields of a hole are written, by the kind of the hole."""


def _fill(part: str | Hole, op: Op) -> str:
    if isinstance(part, str):
        return part
    values: tuple[Any, ...] = tuple(getattr(op, name) for name in part.fields)
    return _HOLES[part.kind](*values)
