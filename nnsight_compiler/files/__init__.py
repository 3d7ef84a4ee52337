"""Experiment files: an experiment as one safetensors file that holds its program, and all that the program reads."""
