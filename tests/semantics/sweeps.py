"""Random experiments of the kind that the optimiser cares about: loops around traces, on a small model.

Each is written twice, as the same statements: as a program of traces, and as plain Python with torch hooks. A body
names its sites in the order in which the model reaches them, so that plain Python in that order is what it means.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

LAYERS, WIDTH, VOCABULARY, SHORTEST = 3, 4, 6, 3


# --- the model ---


class Attention(nn.Module):
    """Mixes tokens, causally, and returns how much as well."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.full((x.shape[1], x.shape[1]), -1e9).triu(1)
        weights = (x @ x.transpose(1, 2) + hidden).softmax(-1)
        return weights @ self.value(x), weights


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm(x))[0]
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


PARTS = (("", "input"), ("attn", "output"), ("mlp", "output"), ("", "output"))
"""The sites of a layer, in the order in which the model reaches them."""


# --- what a program gives ---


@dataclass
class Outcome:
    """What a run gave: its result, what it printed, and how it ended if not by a result."""

    result: Any = None
    log: list[str] = field(default_factory=list)
    error: str = ""


def outcome(run: Callable[[], Any]) -> Outcome:
    found = Outcome()
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            found.result = run()
        except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
            found.error = f"{type(error).__name__}: {error}"
    found.log = shown.getvalue().splitlines()
    return found


def differences(left: Any, right: Any, where: str = "result") -> Iterator[str]:
    """Where two results differ by more than 1e-4·(1+|x|), or in structure."""
    if isinstance(left, (list, tuple)):
        if type(left) is not type(right) or len(left) != len(right):
            yield f"{where}: {left} and {right}"
            return
        for number, pair in enumerate(zip(left, right, strict=True)):
            yield from differences(*pair, f"{where}[{number}]")
        return
    if isinstance(left, torch.Tensor) != isinstance(right, torch.Tensor):
        yield f"{where}: {left} and {right}"
    elif isinstance(left, torch.Tensor):
        if left.shape != right.shape or not torch.allclose(left, right, rtol=1e-4, atol=1e-4):
            yield f"{where}: {left} and {right}"
    elif isinstance(left, float):
        if not math.isclose(left, right, rel_tol=1e-4, abs_tol=1e-4):
            yield f"{where}: {left} and {right}"
    elif left != right:
        yield f"{where}: {left!r} and {right!r}"


_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def shown(line: str) -> tuple[str, list[float]]:
    """A printed line as its text and its numbers."""
    return _NUMBER.sub("#", line), [float(number) for number in _NUMBER.findall(line)]


# --- the programs ---


@dataclass
class Loop:
    """A loop that the program is in, and its variable."""

    kind: str
    name: str


class Writer:
    """Writes one random program twice."""

    def __init__(self, choices: random.Random, errors: bool = True) -> None:
        self.random = choices
        self.errors = errors
        self.traced: list[str] = []
        self.hooked: list[str] = []
        self.names: list[str] = []
        self.known: dict[str, list[str]] = {"flat": [], "whole": [], "logits": [], "number": []}
        self.loops: list[Loop] = []
        self.indent = 1
        self.forwards = 1
        self.lists = ["kept"]
        self.here: tuple[str, str] | None = None
        self.live: list[str] = []
        self.raised = False
        self.tidy = self.chance(0.85)
        self.quiet = False

    # --- text ---

    def line(self, text: str) -> None:
        """One line of both programs. `SITE` stands for the value at the site at hand."""
        traced, hooked = self.here or ("", "")
        self.traced.append("    " * self.indent + text.replace("SITE", traced))
        extra = 1 if self.here else 0
        self.hooked.append("    " * (self.indent + extra) + text.replace("SITE", hooked))

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def fresh(self, kind: str, prefix: str = "v") -> str:
        name = f"{prefix}{len(self.names)}"
        self.names.append(name)
        if kind:
            self.known[kind].append(name)
        return name

    def assign(self, kind: str, text: str, live: bool = False) -> str:
        name = self.fresh("")
        self.line(f"{name} = {text}")
        self.known[kind].append(name)
        if live:
            self.live.append(name)
        return name

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """What is defined inside is not used after it."""
        known = {kind: list(names) for kind, names in self.known.items()}
        lists = list(self.lists)
        yield
        self.known, self.lists = known, lists

    # --- expressions ---

    def factor(self) -> str:
        strengths = [loop.name for loop in self.loops if loop.kind == "strengths"]
        if strengths and self.chance(0.5):
            return self.random.choice(strengths)
        return self.random.choice(["0.5", "2.0", "-1.0", "0.25"])

    def position(self) -> str:
        positions = [loop.name for loop in self.loops if loop.kind == "positions"]
        if positions and self.chance(0.6):
            return self.random.choice(positions)
        return self.random.choice(["0", "1", "-1", str(SHORTEST - 1)])

    def number(self) -> str:
        """A number, or a tensor of one, that can be put anywhere."""
        if self.known["number"] and self.chance(0.6):
            return self.random.choice(self.known["number"])
        if self.known["flat"] and self.chance(0.5):
            return f"{self.random.choice(self.known['flat'])}[{self.random.randrange(WIDTH)}]"
        if self.known["logits"] and self.chance(0.7):
            one, other = self.random.sample(range(VOCABULARY), 2)
            name = self.random.choice(self.known["logits"])
            return self.random.choice(
                [f"{name}[{one}]", f"({name}[{one}] - {name}[{other}])", f"{name}.softmax(-1)[{one}]"]
            )
        return self.factor()

    def flat(self) -> str:
        vectors = [loop.name for loop in self.loops if loop.kind == "vectors"]
        if vectors and self.chance(0.5):
            return self.random.choice(vectors)
        if self.known["flat"] and self.chance(0.7):
            return self.random.choice(self.known["flat"])
        return self.random.choice(["vector", f"vector * {self.factor()}"])

    # --- statements ---

    def look(self) -> None:
        """Reads at a site."""
        width = "logits" if self.here and "head" in self.here[0] else "flat"
        match self.random.randrange(6):
            case 0:
                self.assign("whole", "SITE", live=True)
            case 1 | 2:
                self.assign(width, f"SITE[0, {self.position()}]", live=True)
            case 3:
                self.assign("number", "SITE.mean()")
            case 4:
                self.assign("number", f"SITE[0, {self.position()}, 0].item()")
            case _:
                self.assign(width, f"SITE[:, {self.position()}].clone()[0]")

    def change(self) -> None:
        """Writes at a site."""
        value = self.flat() if self.here and "head" not in self.here[0] else self.number()
        match self.random.randrange(6):
            case 0 | 1:
                self.line(f"SITE[:, {self.position()}] = {value}")
            case 2:
                self.line(f"SITE[:, {self.position()}] += {value}")
            case 3:
                self.line(f"SITE[:, {self.position()}] *= {self.factor()}")
            case 4:
                self.replace(f"SITE * {self.factor()} + {value}")
            case _:
                self.line(f"SITE[..., {self.random.randrange(WIDTH)}:] = {self.number()}")

    def replace(self, text: str) -> None:
        traced, hooked = self.here or ("", "")
        self.traced.append("    " * self.indent + f"{traced} = {text.replace('SITE', traced)}")
        text = text.replace("SITE", hooked)
        made = f"here = ({text}, *here[1:])" if hooked != "here" else f"here = {text}"
        self.hooked.append("    " * (self.indent + 1) + made)

    def effect(self) -> None:
        """Does something to what is outside of the round."""
        if self.quiet:
            return self.compute()
        kind = self.random.choice(["append", "append", "print", "scores", "total", "total"])
        value = self.number()
        match kind:
            case "append":
                choices = [value, self.flat(), *self.known["whole"], *self.known["logits"]]
                self.line(f"{self.random.choice(self.lists)}.append({self.random.choice(choices)})")
            case "print":
                around = "".join(f", {loop.name}" for loop in self.loops if loop.kind in ("positions", "strengths"))
                self.line(f"print('seen', float({value}){around})")
            case "scores":
                index = [loop.name for loop in self.loops if loop.kind in ("positions", "layers")]
                row, column = (*index, "0", "1")[:2]
                self.line(f"scores[{row}, {column}] {self.random.choice(['=', '+='])} {value}")
            case _:
                self.line(f"total {self.random.choice(['= total * 0.5 +', '+='])} {value}")
        return None

    def compute(self) -> None:
        match self.random.randrange(4):
            case 0:
                self.assign("flat", f"torch.tanh({self.flat()} * {self.factor()})")
            case 1:
                self.assign("number", f"float({self.number()})")
            case 2 if self.known["whole"] and self.here is None:
                self.assign("number", f"{self.random.choice(self.known['whole'])}.sum()")
            case _:
                self.assign("flat", f"{self.flat()} + {self.number()}")

    def fail(self) -> None:
        positions = [loop.name for loop in self.loops if loop.kind == "positions"]
        if not positions or self.raised or not self.errors:
            return
        self.raised = True
        self.assign("number", self.random.choice([f"1 / ({positions[-1]} - 1)", f"[0.5, 2.0][{positions[-1]}]"]))

    def condition(self) -> None:
        numbers = self.known["number"]
        if not numbers:
            return
        self.line(f"if {self.random.choice(numbers)} > {self.random.choice(['0.0', '0.1', '-0.3'])}:")
        self.indent += 1
        with self.scope():
            if self.here and self.chance(0.5):
                self.change()
            else:
                self.effect()
        self.indent -= 1

    def call(self) -> None:
        """Calls modules in the body."""
        self.assign("logits", f"MODEL.head(MODEL.norm({self.flat()}))")

    # --- forwards ---

    def trace(self) -> None:
        prompts = [loop.name for loop in self.loops if loop.kind == "prompts"]
        given = self.random.choice(["x", "x", "other", "xs[0]"])
        if prompts and self.chance(0.7):
            given = self.random.choice(prompts)
        layers = [loop.name for loop in self.loops if loop.kind == "layers"]
        if layers and self.chance(0.8):
            name = self.random.choice(layers)
            sites = [(name, part) for part in range(len(PARTS)) if self.chance(0.35)]
        else:
            lowest = self.random.randrange(2)
            all_sites = [(str(layer), part) for layer in range(lowest, LAYERS) for part in range(len(PARTS))]
            sites = sorted(self.random.sample(all_sites, self.random.randint(0, 3)))
        self.traced.append("    " * self.indent + f"with model.trace({given}):")
        self.hooked.append("    " * self.indent + "sites = []")
        self.indent += 1
        for layer, part in sites:
            module, port = PARTS[part]
            below = f".{module}" if module else ""
            tuple_ = module == "attn"
            self.site(
                f"model.layers[{layer}]{below}.{port}" + ("[0]" if tuple_ else ""),
                "here[0]" if tuple_ else "here",
                f"f'layers.{{{layer}}}{below}', '{port}'",
                [self.look, self.look, self.change, self.change, self.effect, self.compute, self.condition],
                self.random.randint(1, 3),
            )
        if self.chance(0.2):
            self.site("model.norm.output", "here", "'norm', 'output'", [self.look, self.effect, self.change], 1)
        self.site("model.head.output", "here", "'head', 'output'", [self.look, self.effect, self.effect], 1, last=True)
        self.indent -= 1
        self.hooked.append("    " * self.indent + f"hooked(model, {given}, sites)")

    def site(
        self, traced: str, hooked: str, place: str, kinds: Sequence[Callable[[], None]], count: int, last: bool = False
    ) -> None:
        self.indent -= 1  # functions stand beside `sites`
        name = f"at{len(self.names)}"
        self.names.append(name)
        start, outer = len(self.hooked), self.indent
        self.here, self.live = (traced, hooked), []
        self._traced_deeper(lambda: self._statements(kinds, count, last))
        for each in self.live:
            self.hooked.append("    " * (outer + 1) + f"{each} = {each}.clone()")
        self.hooked.append("    " * (outer + 1) + "return here")
        assigned = {found for line in self.hooked[start:] for found in re.findall(r"^\s+(\w+) (?:[+*]?=) ", line)}
        shared = sorted(assigned - {"here"})
        head = ["    " * outer + f"def {name}(here):"]
        if shared:
            head.append("    " * (outer + 1) + f"nonlocal {', '.join(shared)}")
        self.hooked[start:start] = head
        self.hooked.append("    " * outer + f"sites.append(({place}, {name}))")
        self.here = None
        self.indent += 1

    def _traced_deeper(self, write: Callable[[], None]) -> None:
        """Bodies are one level deeper than the functions that stand for their sites, which `line` accounts for."""
        start = len(self.traced)
        write()
        self.traced[start:] = ["    " + line for line in self.traced[start:]]

    def _statements(self, kinds: Sequence[Callable[[], None]], count: int, last: bool) -> None:
        if last:
            self.assign("logits", f"SITE[0, {self.position()}]", live=True)
        for _ in range(count):
            self.random.choice(kinds)()
        if self.chance(0.1):
            self.call()
        if self.chance(0.03):
            self.fail()

    # --- loops ---

    def loop(self, depth: int) -> None:
        kinds = {
            "positions": (f"range({SHORTEST})", SHORTEST),
            "prompts": ("xs", 3),
            "strengths": ("(0.5, 2.0, -1.0)", 3),
            "layers": (self.random.choice(["range(2)", "(2, 0)", f"range({LAYERS})"]), LAYERS),
            "vectors": ("vectors", 2),
        }
        kinds = {kind: each for kind, each in kinds.items() if each[1] * self.forwards <= 12}
        if not kinds:
            self.trace()
            return
        kind = self.random.choice(list(kinds))
        over, times = kinds[kind]
        name = self.fresh(
            "", {"positions": "p", "prompts": "x", "strengths": "s", "layers": "layer", "vectors": "u"}[kind]
        )
        row = ""
        if self.chance(0.5):
            row = self.fresh("", "row")
            self.line(f"{row} = list()")
        leaks = ""
        if self.chance(0.2):
            leaks = self.fresh("", "last")
            self.line(f"{leaks} = 0.0")
        self.line(f"for {name} in {over}:")
        with self.scope():
            self.loops.append(Loop(kind, name))
            self.forwards *= times
            self.indent += 1
            if row:
                self.lists.append(row)
            self.round(depth, name, kind)
            if leaks:
                self.line(f"{leaks} = {self.number()}")
            self.indent -= 1
            self.forwards //= times
            self.loops.pop()
        if row:
            self.line(f"{self.random.choice(self.lists)}.append({row})")
        if leaks:
            self.known["number"].append(leaks)

    def round(self, depth: int, name: str, kind: str) -> None:
        """One round: in a tidy program, what it does to things outside comes after its last forward."""
        self.quiet = self.tidy
        for _ in range(self.random.randrange(2)):
            self.random.choice([self.effect, self.compute, self.compute])()
        if kind == "positions" and self.chance(0.2):
            self.line(f"if {name} == 1:")
            self.indent += 1
            if self.chance(0.3):
                with self.scope():
                    self.effect()
            self.line("continue")
            self.indent -= 1
        if depth and self.chance(0.6):
            if self.chance(0.3):
                self.trace()
            self.loop(depth - 1)
        else:
            if self.chance(0.2):
                self.trace()
            self.quiet = False
            self.trace()
        for _ in range(self.random.randrange(3)):
            self.random.choice([self.effect, self.effect, self.compute, self.condition])()
        if self.chance(0.04):
            self.fail()

    def stumble(self) -> None:
        """Fails on some of the inputs, or where enough was collected."""
        if self.errors and not self.raised:
            self.raised = True
            text = ["1 / (x.shape[1] - 3)", "1 / (other.shape[1] - 4)", "[0.5, 2.0][len(kept)]", "xs[3][0, 0, 0]"]
            self.assign("number", self.random.choice(text))

    def straight(self) -> tuple[str, str]:
        """A program of traces that follow one another."""
        for _ in range(self.random.randint(2, 5)):
            for _ in range(self.random.choice([0, 0, 1, 2])):
                self.random.choice([self.effect, self.compute, self.compute, self.condition])()
            if self.chance(0.08):
                self.stumble()
            self.trace()
        for _ in range(self.random.randrange(3)):
            self.random.choice([self.effect, self.compute])()
        return self._texts()

    def program(self) -> tuple[str, str]:
        """The text of the traces, and that of the hooks."""
        for _ in range(self.random.randrange(3)):
            self.trace()
        self.loop(2)
        if self.chance(0.4):
            self.random.choice([self.trace, lambda: self.loop(1)])()
        return self._texts()

    def _texts(self) -> tuple[str, str]:
        held = [name for names in self.known.values() for name in names]
        some = self.random.sample(held, min(3, len(held)))
        end = f"    return kept, scores, total, [{', '.join(some)}]"
        head = [
            "def program(model, x, other, xs, vector, vectors):",
            "    kept = list()",
            "    scores = torch.zeros(4, 4)",
            "    total = 0.0",
        ]
        empty = [f"    {name} = None" for name in self.names if not name.startswith("at")]
        traced = "\n".join([*head, *self.traced, end]).replace("MODEL.", "model.")
        hooked = "\n".join([*head, *empty, *self.hooked, end]).replace("MODEL.", "model.")
        return traced, hooked


# --- the oracle ---


class Kept(list[Any]):
    """A list in which tensors stay as they were when they were put in."""

    def append(self, value: Any) -> None:
        super().append(value.clone() if isinstance(value, torch.Tensor) else value)


def run_hooked(model: nn.Module, x: torch.Tensor, sites: Sequence[tuple[str, str, Callable[[Any], Any]]]) -> None:
    """Runs the plain module with these functions at its sites; what they call has no hooks."""
    acting = [True]
    handles = []

    def quiet(function: Callable[[Any], Any], value: Any) -> Any:
        if not acting[0]:
            return value
        acting[0] = False
        try:
            return function(value)
        finally:
            acting[0] = True

    for path, port, function in sites:
        module = model.get_submodule(path)
        if port == "output":
            handles.append(module.register_forward_hook(lambda _m, _a, out, f=function: quiet(f, out)))
        else:
            handles.append(
                module.register_forward_pre_hook(lambda _m, args, f=function: (quiet(f, args[0]), *args[1:]))
            )
    try:
        with torch.no_grad():
            model(x.clone())  # a body that writes to the input does not write to what was given
    finally:
        for handle in handles:
            handle.remove()


def expected(text: str, net: nn.Module, *arguments: Any) -> Outcome:
    scope: dict[str, Any] = {"torch": torch, "hooked": run_hooked, "list": Kept}
    exec(compile(text, "<hooked>", "exec"), scope)
    with torch.no_grad():
        return outcome(lambda: _plain(scope["program"](net, *arguments)))


def _plain(value: Any) -> Any:
    """The result with plain lists."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value
