"""Random experiments against an oracle in which Python itself runs the source.

The oracle runs the text of the experiment with a stand-in for the model, whose sites are plain tensors: an access
gives the site's tensor, so that aliasing is torch's own. What a site holds before the experiment touches it comes from
a run of the plain module under hooks, in which every earlier site holds what the experiment left there. That is not yet
known when a site is read before an earlier one is written, so the text is run again with what the last round left,
until nothing changes: after as many rounds as there are sites, all of them are right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import examples
from torch import nn

from nnsight_compiler import CompileError, NNsight, intervene, save

LAYERS, TOKENS, WIDTH = 3, 3, 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.linear(x)) + 0.5 * x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


SITES = [
    *((f"layers[{n}]{inner}", port) for n in range(LAYERS)
      for inner, port in (("", "input"), (".linear", "output"), (".act", "output"), ("", "output"))),
    ("head", "output"),
]  # fmt: skip
"""The sites that experiments use, in the order in which the model reaches them."""


# --- the oracle ---


class Sites:
    """The tensors at the sites in one round, given what the round before left."""

    def __init__(self, net: nn.Module, left: dict[tuple[str, str], torch.Tensor]) -> None:
        self.net, self.left = net, left
        self.inputs = torch.empty(0)
        self.cells: dict[tuple[str, str], torch.Tensor] = {}

    def get(self, site: tuple[str, str]) -> torch.Tensor:
        if site not in self.cells:
            self.cells[site] = self.run(site)
        return self.cells[site]

    def set(self, site: tuple[str, str], value: Any) -> None:
        held = self.get(site)
        if value is held:
            return
        if not isinstance(value, torch.Tensor):
            value = torch.full_like(held, value)
        storages = {cell.untyped_storage().data_ptr() for name, cell in self.cells.items() if name != site}
        self.cells[site] = value.clone() if value.untyped_storage().data_ptr() in storages else value

    def run(self, site: tuple[str, str]) -> torch.Tensor:
        """What the site holds when the model reaches it."""
        seen: list[torch.Tensor] = []
        handles = []
        for each in SITES[: SITES.index(site) + 1]:
            if each != site and each not in self.left:
                continue
            path = each[0].replace("[", ".").replace("]", "")
            target = self.net.get_submodule(path)

            def act(value: torch.Tensor, each: Any = each) -> torch.Tensor | None:
                if each != site:
                    return self.left[each].clone()
                seen.append(value.clone())
                return None

            if each[1] == "output":
                handles.append(target.register_forward_hook(lambda _m, _a, value, act=act: act(value)))
            else:

                def before(_m: Any, args: Any, act: Any = act) -> Any:
                    new = act(args[0])
                    return None if new is None else (new,)

                handles.append(target.register_forward_pre_hook(before))
        with torch.no_grad():
            self.net(self.inputs.clone())
        for handle in handles:
            handle.remove()
        return seen[0]


class Place:
    """Stands for a module."""

    def __init__(self, sites: Sites, path: str = "") -> None:
        self.__dict__.update(_sites=sites, _path=path)

    def __getattr__(self, name: str) -> Any:
        if name in ("output", "input"):
            return self._sites.get((self._path, name))
        return Place(self._sites, f"{self._path}.{name}".strip("."))

    def __setattr__(self, name: str, value: Any) -> None:
        self._sites.set((self._path, name), value)

    def __getitem__(self, index: int) -> Place:
        return Place(self._sites, f"{self._path}[{index}]")

    def __iter__(self) -> Iterator[Place]:
        return (self[index] for index in range(LAYERS))

    @contextlib.contextmanager
    def trace(self, inputs: torch.Tensor) -> Iterator[None]:
        self._sites.inputs = inputs
        yield


class Kept(list):  # type: ignore[type-arg]
    """A list in which tensors stay as they were when they were put in."""

    def append(self, value: Any) -> None:
        super().append(value.clone() if isinstance(value, torch.Tensor) else value)


def expected(text: str, net: nn.Module, inputs: torch.Tensor) -> Any:
    scope: dict[str, Any] = {"torch": torch, "save": lambda value: value.clone(), "list": Kept}
    exec(compile(text, "<oracle>", "exec"), scope)
    left: dict[tuple[str, str], torch.Tensor] = {}
    for _ in range(2 * len(SITES)):
        sites = Sites(net, left)
        result = scope["program"](Place(sites), inputs)
        new = {site: cell.clone() for site, cell in sites.cells.items()}
        if new.keys() == left.keys() and all(torch.equal(new[site], left[site]) for site in new):
            return result
        left = new
    raise AssertionError("the oracle does not settle")


# --- random programs ---


class Variable:
    """A variable of a random program: `group` stands for its storage, `level` for the site at which it exists."""

    def __init__(self, name: str, group: Group, level: int, flat: bool = False) -> None:
        self.name, self.group, self.level, self.flat = name, group, level, flat


class Group:
    """One storage: of a site, or made by the program. `seen`: the latest site at which anything looked at it."""

    def __init__(self, site: int | None = None, level: int = -1) -> None:
        self.site, self.level, self.seen, self.given = site, level, level, site is not None


class Writer:
    """Writes the text of a random program, of which every value exists where it is needed."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.lines: list[str] = []
        self.variables: list[Variable] = []
        self.count = 0
        self.floor = -1
        self.indent = 2
        self.site_groups: dict[int, Group] = {}
        self.written: set[int] = set()

    def pick(self, choices: list[Any]) -> Any:
        return self.draw(st.sampled_from(choices))

    def number(self) -> float:
        return self.pick([0.0, 0.5, -1.0, 2.0])

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def site(self, lowest: int = 0) -> int:
        return self.draw(st.integers(max(lowest, 0), len(SITES) - 1))

    def spelled(self, site: int) -> str:
        path, port = SITES[site]
        return f"model.{path}.{port}"

    def group_of(self, site: int) -> Group:
        return self.site_groups.setdefault(site, Group(site, site))

    def whole(self, highest: int = len(SITES)) -> list[Variable]:
        return [each for each in self.variables if not each.flat and max(each.level, each.group.level) <= highest]

    def look(self, variable: Variable, at: int) -> None:
        variable.group.seen = max(variable.group.seen, at)

    def expression(self, highest: int = len(SITES)) -> tuple[str, int]:
        """Text of a new tensor, and the site at which it exists."""
        held = self.whole(highest)
        if not held:
            return f"torch.full((2, {TOKENS}, {WIDTH}), {self.number()})", -1
        a, b = self.pick(held), self.pick(held)
        kind = self.pick(["scale", "add", "mean", "tanh", "flip"])
        texts = {
            "scale": f"{a.name} * {self.number()} + 1",
            "add": f"{a.name} + {b.name}",
            "mean": f"{a.name} - {b.name}.mean()",
            "tanh": f"torch.tanh({a.name})",
            "flip": f"{a.name}.flip(1)",
        }
        level = max(a.level, a.group.level)
        if kind in ("add", "mean"):
            level = max(level, b.level, b.group.level)
            self.look(b, level)
        self.look(a, level)
        return texts[kind], level

    # --- statements ---

    def read(self) -> None:
        site, name = self.site(), self.name()
        self.line(f"{name} = {self.spelled(site)}")
        self.variables.append(Variable(name, self.group_of(site), site))

    def compute(self) -> None:
        text, level = self.expression()
        name = self.name()
        self.line(f"{name} = {text}")
        self.variables.append(Variable(name, Group(None, level), level))

    def view(self) -> None:
        held = self.whole()
        if not held:
            return self.read()
        base, name = self.pick(held), self.name()
        self.line(f"{name} = {base.name}[:, {self.draw(st.integers(0, TOKENS - 1))}]")
        self.variables.append(Variable(name, base.group, base.level, flat=True))
        return None

    def in_place(self) -> None:
        """Writes to a variable, by a value that exists where the variable's storage can still be changed."""
        held = [each for each in self.variables if each.group.site is None or each.group.site >= self.floor]
        if not held:
            return
        target = self.pick(held)
        group = target.group
        self.written |= {group.site} - {None}
        if group.site is None:
            # A new value is changed where all that looked at it has done so.
            group.level = max(group.level, group.seen, self.floor)
            if group.given:
                return
        level = group.level if group.site is None else group.site
        sources = [each for each in self.variables if each.flat and max(each.level, each.group.level) <= level]
        value = str(self.number())
        if sources and self.draw(st.booleans()):
            source = self.pick(sources)
            self.look(source, level)
            value = f"{source.name} * 2"
        if target.flat:
            self.line(f"{target.name}{self.pick([f' += {value}', f' *= {value}', f'[:] = {value}'])}")
        else:
            k = self.draw(st.integers(0, TOKENS - 1))
            self.line(f"{target.name}{self.pick([f'[:, {k}] = {value}', f'[:, {k}] += {value}'])}")

    def write_site(self) -> None:
        site = self.site(self.floor)
        self.written.add(site)
        k = self.draw(st.integers(0, TOKENS - 1))
        flat = [each for each in self.variables if each.flat and max(each.level, each.group.level) <= site]
        kind = self.pick(["scalar", "whole", "item", "augmented", "flat"])
        if kind == "flat" and flat:
            source = self.pick(flat)
            self.look(source, site)
            self.line(f"{self.spelled(site)}[:, {k}] = {source.name}")
        elif kind == "item":
            self.line(f"{self.spelled(site)}[:, {k}] = {self.number()}")
        elif kind == "augmented":
            self.line(f"{self.spelled(site)} {self.pick(['+=', '*='])} {self.number()}")
        elif kind == "scalar":
            self.line(f"{self.spelled(site)} = {self.number()}")
            self.site_groups[site] = Group(site, site)
        else:
            text, _ = self.expression(site)
            self.line(f"{self.spelled(site)} = {text}")
            self.site_groups[site] = Group(site, site)

    def assign_variable(self) -> None:
        """Puts a variable itself at a site: a new value is then the site's."""
        site = self.site(self.floor)
        held = [each for each in self.whole(site) if each.group.site is not None or not each.group.given]
        if not held or self.floor >= 0 or site in self.written:
            return
        source = self.pick(held)
        self.look(source, site)
        source.group.given = True
        self.line(f"{self.spelled(site)} = {source.name}")
        self.site_groups[site] = Group(site, site)

    def keep(self) -> None:
        if self.variables:
            variable = self.pick(self.variables)
            self.look(variable, len(SITES) - 1)
            # A tensor of the program's own in a list is the same tensor, as in Python: it is not changed afterwards.
            variable.group.given = True
            self.line(f"kept.append({self.pick([variable.name, f'save({variable.name})', f'{variable.name} * 2'])})")

    def save(self) -> None:
        if self.variables:
            variable, name = self.pick(self.variables), self.name()
            self.line(f"{name} = save({variable.name})")
            level = max(variable.level, variable.group.level)
            self.look(variable, level)
            self.variables.append(Variable(name, Group(None, level), level, variable.flat))

    def loop(self) -> None:
        kind = self.pick(["positions", "layers", "reads"])
        if kind == "positions":
            held = [each for each in self.whole() if each.group.site is not None and each.group.site >= self.floor]
            if held:
                target = self.pick(held)
                # A list of its own: an early write cannot wait for what was appended late (that conflict is an error).
                seen = f"seen{self.name()}"
                self.line(f"{seen} = list()")
                self.line(f"for p in range({self.draw(st.integers(0, TOKENS))}):")
                self.line(f"    {seen}.append({target.name}[:, p])")
                self.line(f"    {target.name}[:, p] {self.pick(['=', '+=', '*='])} p + {self.number()}")
                self.line(f"kept.append({seen})")
                self.look(target, len(SITES) - 1)
        elif kind == "layers" and self.floor < 0:
            order = self.draw(st.permutations(range(LAYERS)))
            self.written |= {n for n, (path, port) in enumerate(SITES) if port == "output" and path[-1] == "]"}
            self.line(f"for n in {tuple(order)}:")
            self.line(f"    model.layers[n].output[:, 0] += n + {self.number()}")
        else:
            self.line("for layer in model.layers:")
            self.line(f"    kept.append(layer.{self.pick(['output', 'act.output', 'linear.output', 'input'])}[:, -1])")

    def condition(self) -> None:
        held = self.whole()
        if not held or self.floor >= 0:
            return
        variable = self.pick(held)
        level = max(variable.level, variable.group.level)
        self.look(variable, level)
        self.line(f"if {variable.name}.mean() > {self.pick([-0.5, 0.0, 0.2])}:")
        before = len(self.variables)
        groups = dict(self.site_groups)
        self.floor, self.indent = level, self.indent + 1
        for _ in range(2):
            start = len(self.lines)
            for _ in range(self.draw(st.integers(1, 2))):
                self.pick([self.in_place, self.write_site, self.keep, self.loop])()
            if len(self.lines) == start:
                self.line("pass")
            del self.variables[before:]
            if self.draw(st.booleans()) or self.lines[-1].strip() == "else:":
                break
            if any(line.strip() == "else:" for line in self.lines[start - 1 : start]):
                break
            self.lines.append("    " * (self.indent - 1) + "else:")
        else:
            self.line("pass")
        if self.lines[-1].strip() == "else:":
            self.line("pass")
        self.floor, self.indent = -1, self.indent - 1
        # Which storage a site holds afterwards, its variables' or a new one, depends on the condition.
        self.site_groups = {site: group for site, group in groups.items() if self.site_groups.get(site) is group}

    def text(self, size: int) -> str:
        steps = [
            self.read, self.read, self.compute, self.view, self.in_place, self.write_site, self.write_site,
            self.assign_variable, self.keep, self.save, self.loop, self.condition,
        ]  # fmt: skip
        for _ in range(size):
            self.pick(steps)()
        names = ", ".join(each.name for each in self.variables)
        return "\n".join(
            [
                "def program(model, x):",
                "    kept = list()",
                "    with model.trace(x):",
                *self.lines,
                "        result = model.head.output",
                f"    return kept, result, ({names}{',' if names else ''})",
            ]
        )


@st.composite
def programs(draw: Any) -> str:
    return Writer(draw).text(draw(st.integers(2, 12)))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    return Net().eval()


def flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [part for each in value for part in flat(each)]


def compare(text: str, net: Net) -> None:
    inputs = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(11))
    wanted = flat(expected(text, net, inputs))
    experiment = intervene.from_source(text, {"torch": torch, "save": save})
    try:
        found = flat(experiment(NNsight(net), inputs.clone()))
    except CompileError as error:
        raise AssertionError(f"refused: {error}\n{text}") from error
    assert len(found) == len(wanted), text
    for number, (value, other) in enumerate(zip(found, wanted, strict=True)):
        assert torch.allclose(value, other, atol=1e-5), f"value {number} differs:\n{value}\n{other}\nin\n{text}"


@examples(25)
@given(text=programs())
def test_random_experiments(net: Net, text: str) -> None:
    compare(text, net)
