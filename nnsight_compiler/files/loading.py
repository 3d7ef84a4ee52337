"""Reads an experiment file. Nothing that stands in it is imported, called or trusted.

Loading reads the document, checks every program, and builds the objects that the programs mention. Names of libraries
are looked up when the experiment first runs, and then in the closed set of `vocabulary` alone.
"""

from __future__ import annotations

import inspect
import linecache
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any, final

import torch

from nnsight_compiler.files.checking import check_program, program_from_json
from nnsight_compiler.files.document import fields, mapping, parse, refuse, string
from nnsight_compiler.files.format import FORMAT, VERSION, read
from nnsight_compiler.files.namespace import Namespace
from nnsight_compiler.files.restore import Restore
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.ir.ops import Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.values import NONE, Value
from nnsight_compiler.runtime.functions import generate_function

if TYPE_CHECKING:
    from nnsight_compiler.experiment import Experiment

_FIELDS = (
    "format", "version", "producer", "qualified_name", "documentation", "program", "closure", "defaults", "globals",
    "objects", "sources",
)  # fmt: skip


def load_experiment(path: str | os.PathLike[str], model: Any = None, allow_host_calls: bool = False) -> Experiment:
    """The experiment in a file.

    Args:
        model: the model, where the experiment does not take it as a parameter but as a global or from its closure.
        allow_host_calls: import and call the functions outside of the table of known calls that the file names. Only
            for files whose author you trust: such a function may do anything.

    Raises:
        FileError: the file is damaged, of another version, or holds what no file may hold.
    """
    container = read(path)
    try:
        return experiment_from(parse(container.text), container.tensors, model, allow_host_calls)
    except FileError as error:
        raise FileError(f"{os.fspath(path)} cannot be loaded: {error}") from None


def experiment_from(
    document: object,
    tensors: Mapping[str, torch.Tensor],
    model: Any = None,
    allow_host_calls: bool = False,
) -> Experiment:
    """The experiment that a document and its tensors stand for."""
    from nnsight_compiler.experiment import Experiment

    code = code_from(document, tensors, Namespace(model, allow_host_calls))
    function = _signature_of(code.program, code.namespace, code.namespace.cells, code.defaults, "program")
    function.__qualname__ = code.qualified_name
    if code.documentation is not None:
        function.__doc__ = code.documentation
    return Experiment(function, code.program, code.namespace)


@final
@dataclass(frozen=True, slots=True)
class Code:
    """What an experiment's document stands for: its program, the names that it reads, the defaults of its parameters.

    objects: what the document's table of objects was made to, by number.
    """

    program: Program
    namespace: Namespace
    defaults: dict[str, Any]
    qualified_name: str
    documentation: str | None
    objects: Mapping[int, Any]


def code_from(
    document: object,
    tensors: Mapping[str, torch.Tensor],
    namespace: Namespace,
    block: bool = False,
) -> Code:
    """Reads the document of an experiment, or of an undecorated block where that may be one.

    Args:
        namespace: an empty one, which is filled.

    Raises:
        FileError: it is damaged, or holds what no file may hold.
    """
    data = fields(versioned(document, FORMAT), _FIELDS, "")
    string(data["producer"], "producer")
    program = program_from_json(data["program"], "program")
    restore = Restore(data["objects"], tensors, namespace)
    for name, node in mapping(data["globals"], "globals").items():
        restore.bind(_identifier(name, "globals"), node, f"globals.{name}")
    cells = {
        _identifier(name, "closure"): restore.cell(node, f"closure.{name}")
        for name, node in mapping(data["closure"], "closure").items()
    }
    namespace.cells.update(cells)
    check_program(program, "program", experiment=True, block=block)
    defaults = restore.defaults(data["defaults"], program, "defaults")
    restore.finish()
    namespace.programs.insert(0, program)
    namespace.check()
    keep_sources(data["sources"])
    qualified_name, documentation = string(data["qualified_name"], "qualified_name"), data["documentation"]
    if documentation is not None:
        string(documentation, "documentation")
    return Code(program, namespace, defaults, qualified_name, documentation, restore.made)


_LOADED_BY = {
    FORMAT: "Experiment.load(path)",
    "nnsight-compiler-edits": "model.import_edits(path)",
}
"""What reads a file of each format."""


def versioned(document: object, expected: str) -> dict[str, Any]:
    """The fields of a document of this format, in a version that is known."""
    data = mapping(document, "")
    found = data.get("format")
    if found != expected:
        other = _LOADED_BY.get(found) if isinstance(found, str) else None
        refuse("format", f"expected {expected!r}" + (f"; this file is read by `{other}`" if other else ""))
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        refuse("version", f"this is version {version!r:.20}, and only {VERSION} is known to this release")
    return data


def _identifier(name: str, where: str) -> str:
    if not name.isidentifier():
        refuse(where, f"{name!r:.80} is no name")
    return name


def _signature_of(
    program: Program,
    namespace: Namespace,
    cells: Mapping[str, CellType],
    defaults: Mapping[str, Any],
    where: str,
) -> FunctionType:
    """A function with the program's name, signature, globals and cells, and without a body: what Python code asks an
    experiment's function for."""
    free = tuple(
        ops.Global(Value(f"free.{number}"), name, "free", span=program.span) for number, name in enumerate(cells)
    )
    body = Region((), (*free, ops.Return(NONE, span=program.span)))
    shell = Program(program.name, program.parameters, body, span=program.span)
    try:
        made = generate_function(shell, namespace, cells, defaults)
        inspect.signature(made)
    except (SyntaxError, ValueError, TypeError, LookupError) as error:
        refuse(where, f"no function has this signature: {error}")
    return made


MAX_LINES = 2**20
"""Up to the last that is shown, of all files together."""
Lines = tuple[int, None, list[str], str]
"""The lines of a file, as `linecache` has them."""


def keep_sources(data: object) -> None:
    """Has errors and tracebacks show the lines of files that are not at hand here."""
    for file, lines in sources_of(data).items():
        if file not in linecache.cache and not os.path.exists(file):
            linecache.cache[file] = lines


def sources_of(data: object) -> dict[str, Lines]:
    """The lines that a document holds, by the names of their files."""
    found: dict[str, Lines] = {}
    rest = MAX_LINES
    for file, held in mapping(data, "sources").items():
        where = f"sources[{file!r:.80}]"
        string(file, where)
        lines: dict[int, str] = {}
        for number, text in mapping(held, where).items():
            if not (number.isascii() and number.isdigit() and len(number) < 8 and 0 < int(number) <= MAX_LINES):
                refuse(where, f"{number!r:.20} is no number of a line")
            lines[int(number)] = string(text, where)
        if lines and "\0" not in file:
            rest -= max(lines)
            if rest < 0:
                refuse("sources", f"they are of more than {MAX_LINES:,} lines")
            whole = [lines.get(number, "") + "\n" for number in range(1, max(lines) + 1)]
            found[file] = sum(map(len, whole)), None, whole, file
    return found
