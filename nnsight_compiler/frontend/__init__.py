"""Python source to IR. Nothing of the user's is run here."""

from nnsight_compiler.frontend.blocks import Block, Lowered, lower_block, lower_each, lower_file
from nnsight_compiler.frontend.functions import lower_function, lower_source

__all__ = ["Block", "Lowered", "lower_block", "lower_each", "lower_file", "lower_function", "lower_source"]
