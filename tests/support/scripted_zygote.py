"""The program of the service's processes for the scripted runner, which needs no torch.

`import nnsight_compiler` brings torch, seconds of it. Here the package is its folder and nothing more, so that a
process is there at once; the modules that run in it are the real ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent.parent


def leave_torch_out() -> None:
    """Has `nnsight_compiler` imported without what its first lines import."""
    package = ModuleType("nnsight_compiler")
    package.__path__ = [str(ROOT / "nnsight_compiler")]
    sys.modules["nnsight_compiler"] = package


if __name__ == "__main__":
    leave_torch_out()
    from nnsight_compiler.service.zygote import main

    main(int(sys.argv[1]), int(sys.argv[2]))
