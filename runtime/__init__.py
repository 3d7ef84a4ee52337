"""IR to torch: plans, generated code, hooks."""

if __name__ != "nnsight_compiler.runtime":
    raise ImportError("import this package as nnsight_compiler.runtime; a second copy of it would make second classes")
