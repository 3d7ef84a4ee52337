"""The command line, `nnsightc`: look at an experiment's IR, run an experiment, see the demo."""

from __future__ import annotations

import gc
import sys

from nnsight_compiler.cli.refusal import RefusalError
from nnsight_compiler.ir.errors import ExperimentError


def main() -> None:
    """Runs `nnsightc`. Exits with 2 where a command cannot be carried out as given, 1 where an experiment fails."""
    gc.disable()  # imports make many objects that stay: to look through them again and again costs a fifth of a start
    try:
        from nnsight_compiler.cli.commands import app

        app()
    except RefusalError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        gc.unfreeze()
        gc.enable()
