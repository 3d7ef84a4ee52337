"""Python source to IR. Nothing of the user's is run here."""

from nnsight_compiler.frontend.blocks import Block, EditBlock, Lowered, lower_block, lower_each, lower_edit, lower_file
from nnsight_compiler.frontend.functions import lower_function, lower_source

__all__ = [
    "Block",
    "EditBlock",
    "Lowered",
    "lower_block",
    "lower_each",
    "lower_edit",
    "lower_file",
    "lower_function",
    "lower_source",
]
