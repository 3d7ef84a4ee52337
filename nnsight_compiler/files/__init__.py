"""Experiment files: an experiment as one safetensors file that holds its program, and all that the program reads."""

from nnsight_compiler.files.loading import load_experiment
from nnsight_compiler.files.saving import LocalOnlyWarning, SavedFile, save_experiment

__all__ = ["LocalOnlyWarning", "SavedFile", "load_experiment", "save_experiment"]
