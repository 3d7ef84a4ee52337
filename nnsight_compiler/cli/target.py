"""What a command works on: `FILE:FUNCTION`, read as text or imported, or an experiment file, which is loaded."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from nnsight_compiler.cli.refusal import RefusalError, unknown, user_code
from nnsight_compiler.ir.program import Program

if TYPE_CHECKING:
    from nnsight_compiler import Experiment

NO_EXPERIMENTS = "decorate a function with @intervene"


@final
@dataclass(frozen=True, slots=True)
class Target:
    """A Python file, and the name of an experiment in it where one is given; or an experiment file (`saved`)."""

    file: Path
    function: str | None
    saved: bool = False

    @classmethod
    def parse(cls, text: str) -> Target:
        """`FILE` or `FILE:FUNCTION`; refuses what is no file, no experiment file and does not parse as Python."""
        name, colon, function = text.rpartition(":")
        # A colon may also belong to the path (`C:\\demo.py`): what follows it then is not a dotted name.
        if not colon or not all(part.isidentifier() for part in function.split(".")) or Path(text).exists():
            name, function = text, ""
        file = Path(name)
        if not file.is_file():
            kind = "is a folder" if file.is_dir() else "does not exist"
            raise RefusalError(
                f"the file {name} {kind}", "give the path of a Python file, as in demo.py or demo.py:patch"
            )
        if _is_saved(file):
            if function:
                raise RefusalError(f"{name} is an experiment file, and holds one experiment", f"leave :{function} out")
            return cls(file, None, True)
        try:
            ast.parse(file.read_bytes(), filename=name)
        except (SyntaxError, ValueError) as error:
            place = f"{name}:{error.lineno}" if isinstance(error, SyntaxError) else name
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            raise RefusalError(
                f"{place}: not Python: {reason}", f"correct that line; python -m py_compile {name} checks"
            ) from None
        return cls(file, function or None)

    def programs(self) -> list[Program]:
        """The IR of the experiment that is named, or of everything in the file. Nothing of the file runs."""
        if self.saved:
            from nnsight_compiler.files.edits import is_edits, programs_of

            return list(programs_of(self.file)) if is_edits(self.file) else [self.experiment().ir]
        from nnsight_compiler.frontend import lower_file

        programs = lower_file(self.file)
        if self.function is None:
            if not programs:
                raise RefusalError(f"{self.file} holds no experiment", NO_EXPERIMENTS)
            return programs
        chosen = [program for program in programs if program.name == self.function]
        if not chosen:
            raise self._unknown(program.name for program in programs)
        return chosen

    def experiment(self, allow_host_calls: bool = False) -> Experiment:
        """Imports the file and gives the experiment that is named, or its only one. An experiment file is loaded."""
        from nnsight_compiler import Experiment

        if self.saved:
            return Experiment.load(self.file, allow_host_calls=allow_host_calls)

        namespace = vars(self._import())
        experiments = {name: value for name, value in namespace.items() if isinstance(value, Experiment)}
        if self.function is None:
            if len(experiments) == 1:
                return next(iter(experiments.values()))
            listed = ", ".join(f"{self.file}:{name}" for name in experiments)
            way_out = f"name one: {listed}" if listed else NO_EXPERIMENTS
            raise RefusalError(f"{self.file} holds {len(experiments) or 'no'} experiments", way_out)
        if self.function not in experiments:
            if self.function in namespace:
                raise RefusalError(f"{self.function} in {self.file} is not an experiment", NO_EXPERIMENTS)
            raise self._unknown(experiments)
        return experiments[self.function]

    def _unknown(self, known: Iterable[str]) -> RefusalError:
        return unknown(f"experiment in {self.file} called", self.function or "", known, NO_EXPERIMENTS)

    def _import(self) -> object:
        specification = importlib.util.spec_from_file_location(self.file.stem, self.file.resolve())
        if specification is None or specification.loader is None:
            raise RefusalError(f"{self.file} cannot be imported", "give the path of a file that ends in .py")
        module = importlib.util.module_from_spec(specification)
        # As when Python runs a file without arguments: its folder comes first, and the module is found by its name.
        sys.path.insert(0, str(self.file.resolve().parent))
        sys.modules[self.file.stem] = module
        arguments, sys.argv = sys.argv, [str(self.file)]
        try:
            with user_code():
                specification.loader.exec_module(module)
        finally:
            sys.argv = arguments
        return module


def _is_saved(file: Path) -> bool:
    """Whether a file is an experiment file, by its name or by how it begins."""
    from nnsight_compiler.files.format import is_safetensors

    return file.suffix == ".safetensors" or is_safetensors(file)
