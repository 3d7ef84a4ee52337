"""Operations inside of a module's forward, during a run: they take hooks as modules do.

The forward of a module whose operations are hooked is rewritten for the run (see `rewriting`) and stands on the
instance as long as a run needs it. It is one run's own: another thread, a run inside this one, and a module that the
body itself calls run the forward that was there.

An operation is named by the path of its module and its own name, `transformer.h.0.attn:self_c_proj_0`; one in the
function that an operation calls by another name after it, `transformer.h.0.attn:attention_interface_1:torch_matmul_0`.
What attention computes (`transformer.h.0.attn:pattern`) is an operation too: see `attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import Any, final

from torch import nn

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.passes.sites import ATTENTION_VALUES
from nnsight_compiler.runtime.active import ACTIVE
from nnsight_compiler.runtime.attention import AttentionError, Form, Spot, attending, form_of
from nnsight_compiler.runtime.replacing import Replaced, forward_of
from nnsight_compiler.runtime.rewriting import rewritten
from nnsight_compiler.runtime.source_operations import NoSourceError, listing

Hook = Callable[..., Any]


@final
class Operations:
    """The operations of one model that one run hooks. `remove` takes all that it did to the modules away.

    refused: takes note of what cannot be hooked, with the reason and the way out, by the path; where it is `None`, that
    is an error.
    recomputed: the attention modules whose attention was computed anew.
    """

    def __init__(self, root: nn.Module, run: object) -> None:
        self.root, self.run = root, run
        self.refused: dict[str, tuple[str, str]] | None = None
        self.recomputed: set[str] = set()
        self.functions: dict[str, _Function] = {}
        self.replaced: list[Replaced] = []

    def operation(self, path: str) -> Operation:
        """The operation at a path. From now on the run has its module run a rewritten forward."""
        owner, _, inner = path.partition(":")
        if owner not in self.functions:
            module = self.root.get_submodule(owner)
            function = self.functions[owner] = _Function(self, owner, module)
            self.replaced.append(Replaced(module, ACTIVE, self.run, function.forward))
        function = self.functions[owner]
        *around, name = inner.split(":")
        for each in around:
            function = function.operation(each).inside()
        return function.operation(name)

    def refuse(self, path: str, reason: str, way_out: str) -> None:
        """Notes that an operation cannot be hooked; an error where no one takes note."""
        if self.refused is None:
            raise RunError(f"`{path}`: {reason}\n  way out: {way_out}")
        self.refused.setdefault(path, (reason, way_out))

    def remove(self) -> None:
        """Has the modules run their own forwards again."""
        for each in self.replaced:
            each.remove()
        for function in self.functions.values():
            function.forget()
        self.replaced, self.functions = [], {}


@final
class _Handle:
    """A hook that is registered."""

    def __init__(self, hooks: list[Any], hook: Any) -> None:
        self.hooks, self.hook = hooks, hook
        hooks.append(hook)

    def remove(self) -> None:
        self.hooks.remove(self.hook)


@final
class Operation:
    """One operation in one run: it takes hooks as a module does, and another `forward` may stand on it (see
    `replacing`)."""

    def __init__(self, operations: Operations, path: str) -> None:
        self.operations, self.path = operations, path
        self.before: list[tuple[Hook, bool]] = []
        self.after: list[Hook] = []
        self.called: list[Callable[..., Any]] = []
        self.inner: _Function | None = None

    def register_forward_pre_hook(self, hook: Hook, with_kwargs: bool = False) -> _Handle:
        """As of a module: the hook gets the operation's arguments, and may give others."""
        return _Handle(self.before, (hook, with_kwargs))

    def register_forward_hook(self, hook: Hook) -> _Handle:
        """As of a module: the hook gets the operation's result, and may give another."""
        return _Handle(self.after, hook)

    def inside(self) -> _Function:
        """The function that the operation calls."""
        if self.inner is None:
            self.inner = _Function(self.operations, self.path, None)
        return self.inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the operation does by itself."""
        return self.called[-1](*args, **kwargs)

    def does(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the operation does in this run."""
        self.called.append(function)
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.called.pop()

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments after the hooks."""
        for hook, with_kwargs in self.before:
            changed = hook(None, args, kwargs) if with_kwargs else hook(None, args)
            if changed is not None:
                args, kwargs = changed
        return args, kwargs

    def gives(self, args: tuple[Any, ...], result: Any) -> Any:
        """The result after the hooks."""
        for hook in self.after:
            changed = hook(None, args, result)
            if changed is not None:
                result = changed
        return result

    def value(self, value: Any) -> Any:
        """What the model goes on with, for an operation that is a value."""
        args, kwargs = self.given((value,), {})
        return self.gives(args, self.does(_same, args, kwargs))


def _same(value: Any) -> Any:
    return value


@final
class _Function:
    """A function whose operations are hooked: the forward of a module, or what an operation calls."""

    def __init__(self, operations: Operations, path: str, module: nn.Module | None) -> None:
        self.operations, self.path, self.module = operations, path, module
        self.held: dict[str, Operation] = {}
        self.made: tuple[Any, Callable[..., Any]] | None = None
        self.spots: Mapping[str, list[Spot]] = {}
        self.form: Form | None = None

    def operation(self, name: str) -> Operation:
        if name not in self.held:
            self.held[name] = Operation(self.operations, f"{self.path}:{name}")
        return self.held[name]

    def forget(self) -> None:
        """Lets go of what was made for the run, which refers to this."""
        self.made = None
        for each in self.held.values():
            if each.inner is not None:
                each.inner.forget()

    # --- running it ---

    def forward(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The forward of the module, in this run. What accelerate does around it is done here too."""
        assert self.module is not None
        hook = vars(self.module).get("_hf_hook")
        if hook is None or "_old_forward" not in vars(self.module):
            return self.rewritten(plain)(*args, **kwargs)
        args, kwargs = hook.pre_forward(self.module, *args, **kwargs)
        return hook.post_forward(self.module, self.rewritten(forward_of(self.module))(*args, **kwargs))

    def rewritten(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the hooked operations in it; as it is where it has none of them."""
        code = getattr(original, "__func__", original)
        if self.made is None or self.made[0] is not code:
            self.made = code, self._rewritten(original)
        return self.made[1]

    def _rewritten(self, original: Callable[..., Any]) -> Callable[..., Any]:
        values = {name for name in self.held if name in ATTENTION_VALUES}
        names = set(self.held) - values
        if values:
            names |= self._attention(values)
        try:
            known = listing(original)
        except NoSourceError as error:
            self._refuse(set(self.held), str(error), "address what is around it")
            return original
        for name in sorted(names - set(known.names)):
            near = get_close_matches(name, known.names, n=3, cutoff=0.5)
            has = f"did you mean `{'`, `'.join(near)}`?" if near else f"it has: {', '.join(known.names[:12])}"
            self._refuse({name}, f"there is no operation `{name}` in {self.described}", has)
            names.discard(name)
        return rewritten(original, frozenset(names), self.perform) if names else original

    def _attention(self, values: set[str]) -> set[str]:
        """Finds where the values of attention stand: the operations that must be rewritten for them."""
        assert self.module is not None
        self.form = form_of(self.module)
        if self.form is None:
            self._refuse(values, f"{self.described} computes no attention that is known here", "use its `.source`")
            return set()
        spots: dict[str, list[Spot]] = {}
        for spot in self.form.spots:
            if spot.name in values:
                spots.setdefault(spot.operation, []).append(spot)
        self.spots = spots
        inner = values & {"pattern", "scores"}
        return {*spots, *(self.form.within if inner else ())}

    def _refuse(self, names: set[str], reason: str, way_out: str) -> None:
        for name in sorted(names):
            self.operations.refuse(f"{self.path}:{name}", reason, way_out)

    @property
    def described(self) -> str:
        return (
            f"the forward of `{self.path or 'the model'}`" if self.module is not None else f"what `{self.path}` calls"
        )

    def perform(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """One operation, in the place of the call that it was."""
        if ACTIVE.run is not self.operations.run:
            return function(*args, **kwargs)
        held = self.held.get(name)
        if held is not None:
            args, kwargs = held.given(args, kwargs)
            if held.inner is not None:
                function = self._inside(held, held.inner, function)
        spots = self.spots.get(name, ())
        for spot in spots:
            args, kwargs = spot.arguments(self.module, self.held[spot.name].value, args, kwargs)
        if self.form is not None and name in self.form.within:
            function = self._attends(function, args, kwargs)
        result = function(*args, **kwargs) if held is None else held.does(function, args, kwargs)
        for spot in spots:
            result = spot.result(self.module, self.held[spot.name].value, result)
        return result if held is None else held.gives(args, result)

    def _inside(self, held: Operation, inner: _Function, function: Callable[..., Any]) -> Callable[..., Any]:
        if isinstance(function, nn.Module):
            inner._refuse(set(inner.held), f"`{held.path}` calls a module", "use the `.source` of that module")
            return function
        return inner.rewritten(function)

    def _attends(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        """What computes attention, with the pattern and the scores in sight."""
        wanted: dict[str, Callable[[Any], Any]] = {
            name: self.held[name].value for name in ("scores", "pattern") if name in self.held
        }
        if not wanted:
            return function
        assert self.form is not None
        try:
            made, recomputes = attending(function, self.form, wanted, args, kwargs)
        except AttentionError as error:
            self._refuse(set(wanted), error.reason, error.way_out)
            return function
        if recomputes:
            self.operations.recomputed.add(self.path)
        return made


def alike(root: nn.Module, paths: Collection[str]) -> frozenset[str]:
    """These operations, and the same ones of all modules of the same classes: what is found out about one layer is then
    known of all."""
    if not paths:
        return frozenset()
    kinds: dict[type[nn.Module], set[str]] = {}
    for path in paths:
        owner, _, inner = path.partition(":")
        kinds.setdefault(type(root.get_submodule(owner)), set()).add(inner)
    return frozenset(
        f"{owner}:{inner}" for owner, module in root.named_modules() for inner in kinds.get(type(module), ())
    )
