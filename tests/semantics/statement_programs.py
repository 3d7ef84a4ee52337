"""Random whole programs: host code, effects on a log, and traces, as the text of a small module.

In the profile `stage-free` a module is chosen, and a trace is reached, only by what is known before the run: constants,
arguments, and the variables of loops over them. In `staged` also by random draws, host calls with effects, the values
of earlier forwards, and state that changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

LAYERS, TOKENS, WIDTH = 4, 3, 4

PRELUDE = """\
import random
import torch

LOG = []
CALLS = 0
FACTOR = 2
TABLE = {"a": 1, "b": 3}


class State:
    def __init__(self):
        self.layer = 0
        self.scale = 0.5
        self.seen = []

    def advance(self):
        self.layer += 1
        LOG.append(("advance", self.layer))
        return self.layer

    def note(self, value):
        self.seen.append(value)
        return len(self.seen)


def draw(limit):
    global CALLS
    CALLS += 1
    LOG.append(("draw", CALLS))
    return random.randrange(limit)


def risky(value):
    LOG.append(("risky", value))
    if value % 3 == 0:
        raise ValueError(value)
    return value + 1
"""

PORTS = [(".input", 0), (".linear.output", 1), (".act.output", 2), (".output", 3)]
"""The sites of a layer, in the order in which it reaches them."""
LAST = 4 * LAYERS
"""The rank of the head's output, after all sites of the layers."""


@dataclass(frozen=True)
class Variable:
    """A variable of a random program.

    kind: `int`, `number`, `full` (a tensor of the shape of a site), `row` (one position of it), `ints` or `fulls`.
    known: an integer that is known before the run, and never assigned to again.
    rank: for the value of a site of the forward that is being written: where that site stands.
    fixed: not to be assigned to.
    """

    name: str
    kind: str
    known: bool = False
    rank: int | None = None
    fixed: bool = False


class Writer:
    """Writes one random program. `choose(n)` is a random number below `n`; smaller ones make simpler programs."""

    def __init__(self, choose: Callable[[int], int], staged: bool) -> None:
        self.choose, self.staged = choose, staged
        self.lines: list[str] = []
        self.helpers: list[str] = []
        self.helper_names: list[str] = []
        self.scope: list[Variable] = []
        self.indent = 1
        self.count = 0
        self.left = 9
        self.in_function = self.in_loop = False
        self.floor = -1
        self.written = False

    # --- choices ---

    def pick(self, choices: list[Any]) -> Any:
        return choices[self.choose(len(choices))]

    def chance(self, percent: int) -> bool:
        return self.choose(100) >= 100 - percent

    def fresh(self, prefix: str = "v") -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    def named(self, *kinds: str) -> list[str]:
        return [each.name for each in self.scope if each.kind in kinds]

    def bind(self, kind: str, text: str, prefix: str = "v", **facts: Any) -> str:
        name = self.fresh(prefix)
        self.line(f"{name} = {text}")
        self.scope.append(Variable(name, kind, **facts))
        return name

    @contextlib.contextmanager
    def block(self, header: str) -> Iterator[None]:
        """An indented block, whose variables are not seen after it."""
        self.line(header)
        before, start = list(self.scope), len(self.lines)
        self.indent += 1
        yield
        if len(self.lines) == start:
            self.line("pass")
        self.indent -= 1
        self.scope = before

    # --- expressions ---

    def integer(self, shown: bool = False) -> str:
        """A host integer. In programs of one stage only what is `shown` may come from state that changes."""
        simple = [*self.named("int"), "0", "1", "2", "3"]
        kinds = ["simple", "simple", "sum", "remainder", "random", "call", "forward"]
        kind = self.pick([*kinds, "list", "table", "state"] if self.staged or shown else kinds)
        fulls, lists = self.named("full", "row"), self.named("ints")
        match kind:
            case "sum":
                return f"({self.pick(simple)} {self.pick(['+', '-', '*'])} {self.pick(simple)})"
            case "remainder":
                return f"{self.pick(simple)} % {self.pick(['2', '3'])}"
            case "list" if lists:
                name = self.pick(lists)
                return self.pick([f"len({name})", f"{name}[-1]", f"max({name})", f"sum({name})"])
            case "table":
                return self.pick(['TABLE["a"]', 'TABLE.get("b", 0)', 'TABLE["b"]'])
            case "random":
                choices = [f"random.randrange({LAYERS})", "random.choice([0, 2, 3])", "random.randint(1, 3)"]
                return self.pick([*choices, *(f"random.choice({name})" for name in lists)])
            case "call":
                return self.pick([f"draw({LAYERS})", "state.advance()", "state.note(1)"])
            case "state":
                return self.pick(["state.layer", "CALLS", "FACTOR", "len(state.seen)"])
            case "forward" if fulls:
                return self.pick(["int({}[0, -1].argmax())", "int(({} > 0).sum())"]).format(self.pick(fulls))
        return str(self.pick(simple))

    def known(self) -> str:
        return str(self.pick([str(n) for n in range(LAYERS)] + [each.name for each in self.scope if each.known] * 2))

    def layer(self) -> str:
        """A number of a layer."""
        if self.staged and self.chance(70):
            return f"({self.integer()}) % {LAYERS}"
        known = self.known()
        return known if known.isdigit() or self.chance(70) else self.pick([f"{known} - 1", f"({known} + 1) % {LAYERS}"])

    def number(self) -> str:
        kind = self.pick(["constant", "constant", "name", "half", "random", "state", "mean", "factor"])
        held, fulls = self.named("number"), self.named("full", "row")
        match kind:
            case "name" if held:
                return str(self.pick(held))
            case "half":
                return f"0.5 * ({self.integer()})"
            case "random":
                return "random.random()"
            case "state":
                return "state.scale"
            case "mean" if fulls:
                return f"float({self.pick(fulls)}.mean())"
            case "factor":
                return "FACTOR"
        return str(self.pick(["0.0", "0.5", "2.0", "-1.0"]))

    def condition(self) -> str:
        kinds = ["parity", "greater", "mean", "random", "and"]
        kind = self.pick([*kinds, "in", "number", "length"] if self.staged else kinds)
        fulls, lists = self.named("full", "row"), self.named("ints")
        match kind:
            case "greater":
                return f"{self.integer()} > {self.integer()}"
            case "in" if lists:
                return f"{self.integer()} in {self.pick(lists)}"
            case "number":
                return f"{self.number()} > {self.pick(['0', '0.3', '1'])}"
            case "mean" if fulls:
                return f"{self.pick(fulls)}.mean() > {self.pick(['0', '0.2', '-0.2'])}"
            case "length" if lists:
                return f"len({self.pick(lists)}) {self.pick(['> 2', '== 3', '< 4'])}"
            case "random":
                return "random.random() < 0.5"
            case "and":
                return f"{self.integer()} {self.pick(['and', 'or'])} not {self.integer()}"
        return f"{self.integer()} % 2 == {self.pick(['0', '1'])}"

    def tensor(self) -> str:
        """A new tensor of the shape of a site."""
        fulls = self.named("full")
        text = self.pick(["{a} * {n} + 1", "torch.tanh({a})", "{a} + {b}", "{a} - {b}.mean()", "{a}.flip(1)"])
        return str(text.format(a=self.pick(fulls), b=self.pick(fulls), n=self.number()))

    # --- statements of the host ---

    def statements(self, most: int = 3) -> None:
        for _ in range(self.choose(most) + 1):
            if self.left <= 0:
                return
            self.left -= 1
            self.statement()

    def statement(self) -> None:
        steps: list[Callable[[], None]] = [
            self.log, self.trace, self.trace, self.compute, self.change, self.call_helper, self.if_, self.for_,
            self.while_, self.try_, self.nested, self.comprehension, self.leave,
        ]  # fmt: skip
        if self.indent > 3:
            steps = [self.log, self.trace, self.compute, self.change, self.leave]
        self.pick(steps)()

    def log(self) -> None:
        tag = self.fresh("t")
        fulls, lists = self.named("full", "row"), self.named("ints")
        kind = self.pick(["integer", "number", "sum", "text", "list", "length"])
        match kind:
            case "sum" if fulls:
                return self.line(f'LOG.append(("{tag}", float({self.pick(fulls)}.sum())))')
            case "text":
                text = f"{tag} {{{self.integer(shown=True)}}} {{{self.number()}:.3f}}".replace('"', "'")
                return self.line(f'LOG.append(f"{text}")')
            case "list" if lists:
                return self.line(f'LOG.append(("{tag}", list({self.pick(lists)})))')
            case "length":
                return self.line(f'LOG.append(("{tag}", len(LOG)))')
            case "number":
                return self.line(f'LOG.append(("{tag}", {self.number()}))')
        return self.line(f'LOG.append(("{tag}", {self.integer(shown=True)}))')

    def compute(self) -> None:
        kind = self.pick(["int", "int", "number", "full", "ints"])
        match kind:
            case "full" if self.named("full"):
                self.bind("full", self.tensor())
            case "number":
                self.bind("number", self.number())
            case "ints":
                items = ", ".join(self.integer() for _ in range(self.choose(3) + 1))
                text = f"[{items}]"
                if lists := self.named("ints"):
                    name = self.pick(lists)
                    text = self.pick([text, f"sorted({name})", f"[n + 1 for n in {name}]", f"list({name})"])
                self.bind("ints", text)
            case _:
                self.bind("int", self.integer())

    def change(self) -> None:
        """Changes a variable, a container, or state that others see."""
        variables = [each for each in self.scope if not each.fixed and not each.known]
        kind = self.pick(["assign", "assign", "state", "list", "global", "table"])
        held = [each for each in variables if each.kind in ("int", "number")]
        lists = self.named("ints")
        match kind:
            case "assign" if held:
                variable = self.pick(held)
                value = self.integer() if variable.kind == "int" else self.number()
                self.line(f"{variable.name} {self.pick(['=', '+=', '-='])} {value}")
            case "list" if lists:
                name = self.pick(lists)
                self.line(
                    self.pick(
                        [f"{name}.append({self.integer()})", f"{name}[0] = {self.integer()}", f"{name}.reverse()",
                         f"random.shuffle({name})", f"{name}.sort()", f"{name} += [{self.integer()}]"]
                    )
                )  # fmt: skip
            case "global":
                self.line(f"{self.pick(['CALLS', 'FACTOR'])} {self.pick(['+=', '='])} {self.integer()}")
            case "table":
                self.line(f'TABLE["{self.pick(["a", "b"])}"] = {self.integer()}')
            case _:
                self.line(
                    self.pick(
                        [f"state.layer += {self.integer()}", f"state.layer = {self.integer()}",
                         f"state.scale = {self.number()}", f"state.note({self.integer()})", "state.advance()"]
                    )
                )  # fmt: skip

    def if_(self) -> None:
        with self.block(f"if {self.condition()}:"):
            self.statements(2)
        if self.chance(40):
            with self.block("else:"):
                self.statements(2)

    def for_(self) -> None:
        name = self.fresh("n")
        known = [f"range({self.choose(3) + 1})", "(2, 0, 3)", "layers", "[1, 1]", "range(len(model.layers))"]
        other = [f"range({self.integer()} % 4)", *(self.named("ints") if self.staged else [])]
        facts: dict[str, Any] = {"known": True}
        header = f"for {name} in {self.pick(known)}:"
        if self.chance(50):
            facts = {"fixed": True}
            header = f"for {name} in {self.pick(other)}:"
        elif self.chance(30):
            place = self.fresh("p")
            header = f"for {place}, {name} in enumerate({self.pick(known)}):"
        was, self.in_loop = self.in_loop, True
        with self.block(header):
            if header.startswith("for p"):
                self.scope.append(Variable(place, "int", fixed=True))
            if self.staged or "known" in facts:
                self.scope.append(Variable(name, "int", **facts))
            if "ints" in facts or any(f"in {each}:" in header for each in self.named("ints")):
                # A list that grows while it is looped over may never end.
                self.line(f"if len(LOG) > 60 or {name} > 90:")
                self.line("    break")
            self.statements()
        self.in_loop = was

    def while_(self) -> None:
        count = self.fresh("c")
        self.line(f"{count} = 0")
        if self.staged:
            self.scope.append(Variable(count, "int", fixed=True))
        bound = f"{count} < {self.choose(3) + 1}"
        was, self.in_loop = self.in_loop, True
        with self.block(f"while {self.pick([bound, f'{bound} and ({self.condition()})'])}:"):
            self.line(f"{count} += 1")
            self.statements()
        self.in_loop = was

    def leave(self) -> None:
        """A jump, under a condition."""
        if self.in_loop and self.chance(70):
            jump = self.pick(["break", "continue"])
        else:
            fulls = self.named("full")
            jump = f"return {self.pick([self.integer(), *fulls])}"
        self.line(f"if {self.condition()}:")
        self.line(f"    {jump}")

    def try_(self) -> None:
        was, self.in_loop = self.in_loop, self.in_loop and self.staged
        with self.block("try:"):
            self.statements(2)
            kind = self.pick(["index", "division", "raise", "call", "key"])
            name = self.pick(self.named("ints"))
            text = {
                "index": f"{name}[{self.integer()}]",
                "division": f"6 // ({self.integer()})",
                "raise": f"raise ValueError({self.integer()})",
                "call": f"risky({self.integer()})",
                "key": f"TABLE[{self.integer()}]",
            }[kind]
            if kind == "raise":
                with self.block(f"if {self.condition()}:"):
                    self.line(text)
            else:
                self.bind("int", text)
            self.statements(2)
        self.in_loop = was
        named = self.pick([["IndexError", "ZeroDivisionError", "ValueError", "KeyError"], ["ValueError", "IndexError"]])
        with self.block(f"except ({', '.join(named)}) as error:"):
            self.line('LOG.append(("caught", type(error).__name__))')
            self.statements(1)
        if self.chance(25):
            with self.block("finally:"):
                self.log()

    def call_helper(self) -> None:
        if not self.helper_names or (len(self.helper_names) < 2 and self.chance(30)):
            if self.in_function:
                return
            self.write_helper()
        name = self.pick(self.helper_names)
        self.bind("full", f"{name}(model, {self.inputs()}, {self.layer()}, {self.number()}, state)")

    def write_helper(self) -> None:
        held = self.lines, self.scope, self.indent, self.in_loop, self.in_function
        name = self.fresh("helper")
        self.lines, self.indent, self.in_loop, self.in_function = [], 1, False, True
        self.scope = [
            Variable("x", "full", fixed=True),
            Variable("layer", "int", known=True),
            Variable("scale", "number"),
        ]
        self.lines.append(f"def {name}(model, x, layer, scale, state):")
        if self.chance(40):
            self.log()
        self.trace()
        if self.chance(50):
            self.change()
        self.line(f"return {self.pick(self.named('full'))}")
        self.helpers += [*self.lines, "", ""]
        self.lines, self.scope, self.indent, self.in_loop, self.in_function = held
        self.helper_names.append(name)

    def nested(self) -> None:
        """A function in the function, which traces."""
        name, layer = self.fresh("inner"), self.fresh("n")
        loop, self.in_loop = self.in_loop, False
        function, self.in_function = self.in_function, True
        before = list(self.scope)
        self.scope = [
            Variable(v.name, v.kind, v.known and (self.staged or v.name == "layer"), fixed=True) for v in self.scope
        ]
        with self.block(f"def {name}({layer}):"):
            self.scope.append(Variable(layer, "int", known=True))
            self.trace()
            self.line(f"return {self.pick(self.named('full'))}")
        self.in_loop, self.in_function, self.scope = loop, function, before
        self.bind("full", f"{name}({self.layer()})")

    def comprehension(self) -> None:
        if not self.helper_names:
            return self.compute()
        over = "layers" if not self.staged or self.chance(40) else self.pick(self.named("ints"))
        name = self.fresh()
        helper = self.pick(self.helper_names)
        layer = f"n % {LAYERS}"
        self.line(f"{name} = [{helper}(model, x, {layer}, {self.number()}, state) for n in {over}]")
        self.line(f'LOG.append(("many", [float(h.sum()) for h in {name}]))')
        self.line(f"kept.extend({name})") if "kept" in self.named("fulls") else None
        return None

    # --- traces ---

    def inputs(self) -> str:
        fulls = self.named("full")
        return str(self.pick(["x", "x", "x * 2", *fulls]))

    def trace(self) -> None:
        mode = self.pick(["fixed", "fixed", "one", "one", "reads", "loop"])
        layer, several = "", "(1, 3)"
        if mode == "loop" and self.staged and self.chance(50):
            numbers = self.pick(self.named("ints") or ["(2, 0)"])
            several = self.bind("chosen", f"sorted({{n % {LAYERS} for n in {numbers}}})", "at")
        if mode in ("one", "reads"):
            # Chosen before the body: what names a module cannot wait for what the forward shows.
            layer = self.known() if not self.staged else self.bind("int", self.layer(), "at", fixed=True)
        self.line(f"with model.trace({self.inputs()}){self.pick(['', ' as tracer'])}:")
        self.indent += 1
        self.floor, self.written = 0, False
        start = len(self.lines)
        for _ in range(self.choose(4) + 1):
            self.access(mode, layer, several)
        if self.written or self.chance(50) or len(self.lines) == start:
            self.bind("full", self.pick(["model.output", "model.head.output"]))
        self.indent -= 1
        self.scope = [Variable(v.name, v.kind, v.known, None, v.fixed) for v in self.scope]

    def access(self, mode: str, layer: str, several: str) -> None:
        """One or two statements of a body."""
        if mode == "loop":
            return self.body_loop(several)
        kind = self.pick(["read", "read", "write", "write", "change", "log", "keep", "compute", "call", "if", "row"])
        if mode == "reads" and kind in ("write", "change", "if", "row"):
            kind = "read"
        match kind:
            case "read":
                if mode == "reads":
                    self.bind("full", f"model.layers[{self.pick([layer, self.known()])}]{self.pick(PORTS)[0]}")
                else:
                    site, rank = self.site(mode, layer)
                    if site:
                        self.bind("full", site, rank=None if site.endswith(".input") else rank)
                        self.floor = max(self.floor, rank)
            case "write":
                site, rank = self.site(mode, layer)
                if site:
                    self.write(site)
                    self.floor = max(self.floor, rank)
            case "change":
                held = [v for v in self.scope if v.rank is not None and v.rank >= self.floor and v.kind == "full"]
                if held:
                    self.written = True
                    name, k = self.pick(held).name, self.choose(TOKENS)
                    self.line(f"{name}[:, {k}] {self.pick(['=', '+=', '*='])} {self.number()}")
            case "log":
                self.log()
            case "keep":
                if fulls := self.named("full"):
                    name = self.pick(fulls)
                    if "kept" in self.named("fulls"):
                        self.line(f"kept.append({self.pick([f'save({name})', f'{name} * 2'])})")
                    else:
                        self.bind("full", f"save({name})")
            case "compute":
                if self.named("full"):
                    self.bind("full", self.tensor())
            case "row":
                held = [v for v in self.scope if v.kind == "full"]
                if held:
                    name = self.pick(held).name
                    self.bind("row", f"{name}[:, {self.choose(TOKENS)}]")
            case "call":
                if self.chance(50):
                    self.bind("int", self.pick([f"draw({LAYERS})", "state.advance()", "state.layer"]))
                else:
                    self.change()
            case "if":
                floor = self.floor
                with self.block(f"if {self.condition()}:"):
                    site, rank = self.site(mode, layer)
                    if site:
                        self.write(site)
                        floor = max(floor, rank)
                    if self.chance(50):
                        self.log()
                self.floor = floor
                self.scope = [Variable(v.name, v.kind, v.known, None, v.fixed) for v in self.scope]
        return None

    def site(self, mode: str, layer: str) -> tuple[str, int]:
        """The text of a site that may still be changed, and its rank; none where the forward has gone by."""
        if mode == "one":
            choices = [(f"model.layers[{layer}]{port}", rank) for port, rank in PORTS]
        else:
            choices = [(f"model.layers[{n}]{port}", 4 * n + rank) for n in range(LAYERS) for port, rank in PORTS]
        choices.append(("model.head.output", LAST))
        choices = [(text, rank) for text, rank in choices if rank >= self.floor]
        return self.pick(choices) if choices else ("", -1)

    def write(self, site: str) -> None:
        self.written = True
        k = self.choose(TOKENS)
        kind = self.pick(["number", "tensor", "kept", "augmented", "item", "row"])
        rows, fulls = self.named("row"), self.named("full")
        match kind:
            case "tensor" if fulls:
                self.replace(site, self.tensor())
            case "row" if rows:
                self.line(f"{site}[:, {k}] {self.pick(['=', '+='])} {self.pick(rows)}")
            case "kept" if "kept" in self.named("fulls"):
                self.replace(site, "torch.tanh(x + sum(kept))")
            case "augmented":
                self.line(f"{site} {self.pick(['+=', '*='])} {self.number()}")
            case "item":
                self.line(f"{site}[:, {k}] = {self.number()}")
            case _:
                self.replace(site, self.number())

    def replace(self, site: str, value: str) -> None:
        """Assigns to a site: what was read there before is no longer what the model goes on with."""
        self.line(f"{site} = {value}")
        self.scope = [Variable(v.name, v.kind, v.known, None, v.fixed) for v in self.scope]

    def body_loop(self, several: str) -> None:
        """A loop over layers in a body."""
        name = self.fresh("n")
        port, _ = self.pick(PORTS[1:])
        kind = "blocks" if self.floor else self.pick(["blocks", "known", "enumerate"])
        self.floor = LAST
        match kind:
            case "blocks":
                with self.block(f"for {name} in model.layers:"):
                    self.line(f'LOG.append(("block", float({name}{port}.sum())))')
            case "known":
                over = self.pick(["(0, 2)", several, "range(3)"])
                self.written = True
                with self.block(f"for {name} in {over}:"):
                    self.line(f"model.layers[{name}]{port}{self.pick(['[:, 0]', ''])} += {self.number()}")
            case _:
                index = self.fresh("n")
                with self.block(f"for {index}, {name} in enumerate(model.layers):"):
                    with self.block(f"if {index} % 2 == {self.pick(['0', '1', 'layer % 2'])}:"):
                        self.line("continue")
                    self.line(f'LOG.append(("layer", {index}, float({name}{port}.mean())))')

    # --- the whole ---

    def text(self) -> str:
        self.scope = [
            Variable("x", "full", fixed=True),
            Variable("layer", "int", known=True),
            Variable("numbers", "ints", fixed=True),
            Variable("scale", "number"),
            Variable("kept", "fulls", fixed=True),
        ]
        for _ in range(3):
            self.statements(3)
        results = [each.name for each in self.scope if each.name not in ("x", "layer", "kept")]
        return "\n".join(
            [
                PRELUDE,
                "",
                *self.helpers,
                "@intervene",
                "def program(model, x, layer, layers, numbers, scale, state):",
                "    global CALLS, FACTOR",
                "    kept = []",
                *self.lines,
                f"    return kept, {', '.join(results)}",
                "",
            ]
        )


@st.composite
def programs(draw: Any, staged: bool) -> str:
    return Writer(lambda bound: draw(st.integers(0, bound - 1)), staged).text()
