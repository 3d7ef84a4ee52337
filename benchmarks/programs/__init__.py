"""The eight workloads in each library, one module a library.

A module has `PROGRAMS`, by workload and then by name, and `wrap`, which makes of a GPT-2 of transformers the model that
its programs are given.
"""
