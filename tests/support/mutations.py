"""Documents with something wrong in them: what strangers may send in place of what this package writes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from nnsight_compiler.ir.ops import ALL_OPS
from nnsight_compiler.ir.syntax import ARITHMETIC, BINARY, UNARY

Path = tuple[Any, ...]


def places(held: Any, path: Path = ()) -> Iterator[Path]:
    """The path of every part of a document."""
    yield path
    if isinstance(held, dict):
        for key, part in held.items():
            yield from places(part, (*path, key))
    elif isinstance(held, list):
        for index, part in enumerate(held):
            yield from places(part, (*path, index))


def at(held: Any, path: Path) -> Any:
    for step in path:
        held = held[step]
    return held


def nested(depth: int) -> Any:
    held: Any = {"constant": "None"}
    for _ in range(depth):
        held = {"tuple": [held]}
    return held


OTHERS: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**200, 1.5, "", "x", "__class__", "__subclasses__", "../..", "a b",
    "lambda", "\ud800", "\0", "torch.from_file", "os:system", [], {}, [[]], {"": 0}, {"object": 0}, {"object": 99},
    {"host": "os:system"}, {"known": "builtins.eval"}, {"namespace": "torch"}, {"model": ""}, nested(50), nested(150),
    {"constant": "unbound"}, {"int": "0x" + "f" * 5000}, {"float": "nan"}, {"bytes": "!"}, [0, 2**40, 0, 0, 0],
]  # fmt: skip
KINDS = [kind.__name__ for kind in ALL_OPS]


def mutate(text: str, paths: list[Path], chance: random.Random) -> Any:
    """The document with one thing wrong in it, or several. `paths` are those of all parts of the whole document."""
    document = json.loads(text)
    for changed in range(chance.choice((1, 1, 1, 2, 5))):
        known = [path for path in places(document) if path] if changed else paths
        path = chance.choice(known)
        owner, last = at(document, path[:-1]), path[-1]
        match chance.randrange(8):
            case 0:
                owner[last] = copy.deepcopy(chance.choice(OTHERS))
            case 1:
                owner[last] = copy.deepcopy(at(document, chance.choice(known)))
            case 2:
                del owner[last]
            case 3 if isinstance(owner, dict):
                owner[chance.choice(("x", "op", "kind", "__class__", "program"))] = owner[last]
            case 4 if isinstance(owner, list):
                owner.insert(last, copy.deepcopy(owner[last]))
            case 5:
                ops = [each for each in known if each[-1] == "op"]
                if ops:
                    at(document, chance.choice(ops)[:-1])["op"] = chance.choice(KINDS)
            case 6:
                texts = [each for each in known if isinstance(at(document, each), str)]
                one, two = chance.choice(texts), chance.choice(texts)
                left, right = at(document, one), at(document, two)
                at(document, one[:-1])[one[-1]], at(document, two[:-1])[two[-1]] = right, left
            case _ if isinstance(owner[last], int):
                owner[last] += chance.choice((-1, 1, 1000))
    return document


# --- programs that are well formed, and mean something else ---

LITERALS: list[Any] = [
    {"int": 0}, {"int": -1}, {"int": 2**31}, {"int": 10**12}, {"int": -(10**12)}, {"int": hex(10**30)},
    {"int": "0x" + "f" * 3000}, {"float": "nan"}, {"float": "inf"}, {"float": 1e308}, {"str": "mlp"}, {"str": ""},
    {"str": "a" * 5000}, {"str": "\0"}, {"bytes": "AAAA"}, {"complex": [0, 1]}, {"constant": "None"},
    {"constant": "True"}, {"constant": "..."}, {"tuple": []}, {"tuple": [{"int": 1}, {"int": 2}]}, nested(20),
    {"slice": [{"constant": "None"}, {"constant": "None"}, {"int": 0}]},
]  # fmt: skip
ATTRIBUTES = (
    "output", "input", "inputs", "layers", "lm_head", "mlp", "attn", "save", "trace", "generate", "iter", "next",
    "skip", "stop", "calls", "result", "shape", "append", "items", "T", "grad", "backward", "weight", "tokenizer",
    "config", "position", "edit", "session", "cache", "residual", "nothing", "transformer", "h", "tracer", "__class__",
    "source", "expand", "repeat", "unsqueeze", "view", "sum", "cat", "stack", "zeros", "arange", "format", "join",
    "barrier", "invoke", "all", "device", "pattern", "scores", "log_softmax", "split", "unbind", "chunk",
    "tolist", "set_",
)  # fmt: skip
NAMES = (
    "range", "len", "list", "tuple", "dict", "enumerate", "zip", "sorted", "sum", "print", "getattr", "isinstance",
    "str", "bytes", "reversed", "map", "filter", "iter", "next", "max", "set", "type", "slice", "model", "int", "float",
    "round",
)  # fmt: skip


_OPERANDS = frozenset({"object", "value", "function", "iterable", "condition", "index", "lower", "model"})
_LISTS = frozenset({"operands", "values", "initial", "tuple", "slice"})


def operands(op: Any) -> list[Path]:
    """The places of an op where an operand stands, a value's name or a literal; those of ops inside it not."""
    found = [path for path in places(op) if path and "ops" not in path]
    return [path for path in found if path[-1] in _OPERANDS or (len(path) > 1 and path[-2] in _LISTS)]


def turn(text: str, chance: random.Random) -> Any:
    """The document with its programs changed so that most are still well formed: other constants, operands, attributes,
    operators, an op twice, one fewer."""
    document = json.loads(text)
    for _ in range(chance.choice((1, 1, 2, 3))):
        ops = [path for path in places(document) if path and isinstance(at(document, path), dict)
               and at(document, path).get("op") in KINDS]  # fmt: skip
        which = chance.choice(ops)
        op = at(document, which)
        held = operands(op)
        match chance.randrange(9):
            case 0 | 1 if held:
                path = chance.choice(held)
                at(op, path[:-1])[path[-1]] = copy.deepcopy(chance.choice(LITERALS))
            case 2 | 3 if held:
                path = chance.choice(held)
                at(op, path[:-1])[path[-1]] = chance.choice(_defined(document))
            case 4 if op["op"] in ("Attribute", "SetAttribute"):
                op["name"] = chance.choice(ATTRIBUTES)
            case 4 if op["op"] == "Global":
                op["name"], op["scope"] = chance.choice(NAMES), "global"
            case 5 if op["op"] == "Operator":
                signs = UNARY if len(op["operands"]) == 1 else ARITHMETIC if op["in_place"] else BINARY
                op["operator"] = chance.choice(sorted(signs))
            case 6:
                del at(document, which[:-1])[which[-1]]
            case 7 if isinstance(which[-1], int):
                owner = at(document, which[:-1])
                copied = json.dumps(op)
                for name in _defined(op):
                    copied = copied.replace(json.dumps(name), json.dumps(f"{name}.{chance.randrange(10**6)}"))
                owner.insert(which[-1], json.loads(copied))
            case 8 if isinstance(which[-1], int):
                owner = at(document, which[:-1])
                owner.insert(chance.randrange(len(owner)), owner.pop(which[-1]))
    return document


def _defined(held: Any) -> list[str]:
    """The names of the values that are defined in it."""
    found = [path for path in places(held) if path and isinstance(at(held, path), str)]
    return [
        at(held, path)
        for path in found
        if path[-1] == "result" or (len(path) > 1 and path[-2] in ("results", "parameters"))
    ]
