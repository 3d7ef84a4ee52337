"""How models and programs are shown in a notebook: HTML that stands by itself, without scripts, for any theme."""

from nnsight_compiler.html.modules import modules_html
from nnsight_compiler.html.programs import program_html, stages_html

__all__ = ["modules_html", "program_html", "stages_html"]
