"""IR to IR: one file a pass, and the analyses that they share."""

if __name__ != "nnsight_compiler.passes":
    raise ImportError("import this package as nnsight_compiler.passes; a second copy of it would make second classes")
