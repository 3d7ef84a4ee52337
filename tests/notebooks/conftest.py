"""A real kernel, driven through nbclient: one for each module of tests, since starting it takes seconds."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

START = """
import os, sys
import torch
from torch import nn
torch.set_num_threads(1)
from nnsight_compiler import NNsight, intervene

torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
model = NNsight(plain)
X = torch.randn(2, 4)
"""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Cell:
    """What one run of a cell gave back."""

    def __init__(self, node: NotebookNode) -> None:
        self.number = node.execution_count
        self.outputs = node.outputs

    @property
    def printed(self) -> str:
        return "".join(each.text for each in self.outputs if each.output_type == "stream" and each.name == "stdout")

    @property
    def warned(self) -> str:
        return "".join(each.text for each in self.outputs if each.output_type == "stream" and each.name == "stderr")

    @property
    def shown(self) -> dict[str, str]:
        """The representations of what the last expression gave."""
        return next((dict(each.data) for each in self.outputs if each.output_type == "execute_result"), {})

    @property
    def error(self) -> str:
        """The name of the error that it raised, if any."""
        return next((each.ename for each in self.outputs if each.output_type == "error"), "")

    @property
    def traceback(self) -> str:
        """What the user sees of the error, without colours."""
        found = next(each for each in self.outputs if each.output_type == "error")
        return _COLOURS.sub("", "\n".join(found.traceback))


class Kernel:
    """A running kernel. Calling it runs a cell."""

    def __init__(self, client: NotebookClient, folder: Path) -> None:
        self.client = client
        self.folder = folder

    def run(self, source: str) -> Cell:
        """Runs a cell, which may fail."""
        node = nbformat.v4.new_code_cell(textwrap.dedent(source).strip("\n"))
        self.client.nb.cells.append(node)
        return Cell(self.client.execute_cell(node, len(self.client.nb.cells) - 1))

    def __call__(self, source: str) -> Cell:
        """Runs a cell that must not fail, nor warn."""
        cell = self.run(source)
        assert not cell.error, cell.traceback
        assert not cell.warned, cell.warned
        return cell


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("kernel")
    client = NotebookClient(
        nbformat.v4.new_notebook(),
        kernel_name="python3",
        timeout=120,
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
    )
    with client.setup_kernel():
        started = Kernel(client, folder)
        started(START)
        yield started
