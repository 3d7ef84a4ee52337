"""The wrapper that any `nn.Module` can be put into, so that experiments can be run on it."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.models import generation
from nnsight_compiler.models.aliases import Aliases, Rename, bind
from nnsight_compiler.models.view import ModuleView, describe
from nnsight_compiler.runtime.signatures import forward_parameters

if TYPE_CHECKING:
    from nnsight_compiler.block import Trace
    from nnsight_compiler.edits import Edit, EditContext
    from nnsight_compiler.files.edits import SavedEdits
    from nnsight_compiler.ir.program import Program
    from nnsight_compiler.passes.rows import Batch

_tokens = itertools.count()
"""Numbers wrapped models, so that what was compiled for one is never taken for another's."""

_OF_A_VIEW = frozenset({"_edits", "_origin"})
"""What an edited view has of its own; everything else is the model's."""

GENERATION_ARGUMENTS = frozenset(
    {
        "max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "do_sample", "num_beams",
        "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
        "num_return_sequences", "length_penalty", "early_stopping", "streamer", "stopping_criteria",
        "stop_strings", "logits_processor", "generation_config", "assistant_model", "return_dict_in_generate",
    }
)  # fmt: skip
"""Arguments of `generate` which a single forward would ignore or choke on."""

REMOTE_ARGUMENTS = frozenset({"remote", "blocking", "backend", "serve"})
"""Arguments that send a trace elsewhere, here or in other libraries. The first two are taken off before a trace is
compiled, where they say where a whole experiment runs."""


EDITS_GO_ALONG = (
    ": an edit runs wherever the traces of the edited model do\n"
    "  way out: say `remote=` in these traces, as in `edited.trace(…, remote=True)`; the edit goes along"
)
"""What is told to who wants an edit to run elsewhere."""


class TraceArgumentError(ModelError, TypeError):
    """An argument that `trace` does not take."""


class NNsight(ModuleView):
    """Any `nn.Module`, wrapped. Submodules, weights and attributes are reached as on the module itself.

    `rename` gives modules names of one's own: `{"transformer.h": "layers", "mlp": "ff"}` (see `models.aliases`).

    Subclasses say how inputs are prepared (`_prepare`) and when weights are loaded (`_ready`).
    """

    _wrapped: nn.Module
    _source: str
    _rename: Rename
    _aliases: Aliases
    _edits: tuple[Edit, ...]
    _origin: NNsight | None
    _tokens: dict[tuple[int, ...], tuple[int, tuple[Program, ...]]]
    _host: str | None

    def __init__(self, module: nn.Module, rename: Rename | None = None) -> None:
        if isinstance(module, ModuleView):
            raise ModelError(f"{describe(module)} is wrapped already; wrap a torch module")
        if not isinstance(module, nn.Module):
            raise ModelError(f"a torch.nn.Module is needed, not {type(module).__name__}")
        super().__init__(self, "")
        self._wrapped = module
        self._source = ""
        self._origin, self._edits = None, ()
        self._rename = {**rename} if rename else {}
        self._aliases = bind(module, self._rename, type(self))
        self._attached: set[str] = set()
        self._tokens = {}
        self._host = None

    def _attach(self, path: str, gone: bool = False) -> None:
        """Notes a module that was attached or taken away: what was compiled for this model before is compiled anew."""
        (self._attached.discard if gone else self._attached.add)(path)
        self._tokens.clear()

    @property
    def _token(self) -> int:
        """A number that no other model has or had, with this code of edits, whatever the edits captured."""
        programs = tuple(edit.program for edit in self._edits)
        code = tuple(id(program.body) for program in programs)
        held = self._tokens.get(code)
        if held is None:
            held = self._tokens.setdefault(code, (next(_tokens), programs))
        return held[0]

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            object.__setattr__(self if name in _OF_A_VIEW else self._base, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        base = self._base
        if base is not self and name.startswith("_"):
            return getattr(base, name)
        return super().__getattr__(name)

    @property
    def _root(self) -> NNsight:  # type: ignore[override]  # a module's is another model
        return self

    @property
    def _base(self) -> NNsight:
        """The model itself, of which an edited view shares everything but its edits."""
        return vars(self).get("_origin") or self

    @property
    def _is_known(self) -> bool:
        """Whether something was compiled for edits of this code before."""
        return tuple(id(edit.program.body) for edit in self._edits) in self._tokens

    def _with_edits(self, edits: tuple[Edit, ...]) -> Self:
        """A view of the same model with these edits."""
        view = object.__new__(type(self))
        ModuleView.__init__(view, view, "")
        view._origin, view._edits = self._base, edits
        return view

    def _renamed(self, rename: Rename) -> NNsight:
        """The same module, with other names of one's own."""
        return type(self)(self._ready(), rename=rename)

    def edit(self, *, inplace: bool = False, **elsewhere: Any) -> EditContext:
        """An edited view: `with model.edit() as edited:` and a body that reads and writes the model's internals, which
        runs first in every forward of `edited`. It shares the weights, and the model itself stays as it is; with
        `inplace`, the model itself is edited.

        Raises:
            TraceArgumentError: it is given something else, such as `remote=`.
        """
        from nnsight_compiler.edits import EditContext  # it is built on this module

        if elsewhere:
            told = EDITS_GO_ALONG if elsewhere.keys() <= REMOTE_ARGUMENTS else ""
            raise TraceArgumentError(f"`edit` takes no argument but `inplace` ({', '.join(elsewhere)}){told}")
        return EditContext(self, inplace)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits of this model, in the order in which they run."""
        return self._edits

    def clear_edits(self) -> None:
        """Takes off every edit of this model, or of this edited view."""
        self._edits = ()

    def export_edits(self, path: str | os.PathLike[str]) -> SavedEdits:
        """Writes the edits to a file, with all that they captured (see `docs/edits.md`)."""
        from nnsight_compiler.files.edits import export_edits  # it is built on this module

        return export_edits(self, path)

    def import_edits(
        self, path: str | os.PathLike[str], *, inplace: bool = False, allow_host_calls: bool = False
    ) -> Self:
        """A view of this model with the edits of a file besides its own; with `inplace`, the model itself gets them."""
        from nnsight_compiler.files.edits import import_edits  # it is built on this module

        edits = import_edits(self, path, allow_host_calls)
        if inplace:
            self._edits = (*self._edits, *edits)
            return self
        return self._with_edits((*self._edits, *edits))

    def __repr__(self) -> str:
        edits = "".join(f"\nedit {number}: {edit}" for number, edit in enumerate(self._edits))
        return super().__repr__() + edits

    def trace(self, *args: Any, **kwargs: Any) -> Trace:
        """One forward of the model: `with model.trace(inputs):` and a body that reads and writes its internals."""
        return self._traced("trace", args, kwargs)

    def scan(self, *args: Any, **kwargs: Any) -> Trace:
        """The same on tensors without data: `with model.scan(inputs):` checks shapes, dtypes, names and indices. No
        weights are loaded, and what is saved has a shape, a dtype and a device."""
        return self._traced("scan", args, kwargs)

    def session(self, *args: Any, **kwargs: Any) -> Trace:
        """Several traces as one program: `with model.session():` and traces inside it, whose values flow from one to
        the next without being saved."""
        from nnsight_compiler.block import Trace  # it is built on this module
        from nnsight_compiler.remote.routing import checked

        route = checked(kwargs.pop("remote", self._host), kwargs.pop("blocking", True))
        if args or kwargs:
            named = ", ".join((*map(repr, args), *kwargs))
            raise TraceArgumentError(f"`.session()` takes no arguments but `remote=` and `blocking=` ({named})")
        return Trace(self, "session", (), {}, route)

    def generate(self, *args: Any, **kwargs: Any) -> Trace:
        """A generation: `with model.generate(prompt, max_new_tokens=5) as tracer:` and a body that takes part in its
        steps. Arguments are those of `generate` of the torch module, and `seed` and `on_token`."""
        return self._traced("generate", args, kwargs)

    def _traced(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        from nnsight_compiler.block import Trace  # it is built on this module
        from nnsight_compiler.remote.routing import checked

        if method == "scan" and "remote" in kwargs:
            raise TraceArgumentError("`scan` takes no remote: it needs no weights, and runs here")
        home = None if method == "scan" else self._host
        route = checked(kwargs.pop("remote", home), kwargs.pop("blocking", True))
        self._check_arguments(method, kwargs.keys())
        return Trace(self, method, args, kwargs, route)

    def _check_arguments(self, method: str, names: Collection[str]) -> None:
        """Refuses what would otherwise be ignored.

        Raises:
            ModelError: an argument that `trace` or `generate` does not take, or a model that does not generate.
        """
        if method == "generate":
            elsewhere = sorted(REMOTE_ARGUMENTS & set(names))
            if elsewhere:
                raise TraceArgumentError(_elsewhere("generate", elsewhere))
            generation.check_arguments(self._wrapped, names, self._forward_parameters())
            return
        wrong = sorted(GENERATION_ARGUMENTS & set(names) - self._forward_parameters().keys())
        if wrong:
            raise TraceArgumentError(
                f"`{method}` runs one forward and takes no {', '.join(wrong)}: these are arguments of `generate`"
            )
        elsewhere = sorted(REMOTE_ARGUMENTS & set(names))
        if elsewhere:
            raise TraceArgumentError(_elsewhere(method, elsewhere))
        known = self._keywords()
        wrong = [] if known is None else sorted(set(names) - known)
        if known is not None and wrong:
            near = get_close_matches(wrong[0], known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it takes: {', '.join(sorted(known))}"
            raise TraceArgumentError(f"the forward of {self._class_name} takes no `{wrong[0]}`; {hint}")

    def verify(self, *args: Any, **kwargs: Any) -> bool:
        """Whether an experiment that changes nothing gives, bit for bit, what the plain model gives on these inputs.

        Raises:
            ModelError: it does not; the message says by how much.
        """
        from nnsight_compiler.verification import verify  # it is built on this module

        verify(self, args, kwargs)
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on inputs as `trace` takes them: the plain model, or the edited one where it has edits."""
        if self._edits:
            from nnsight_compiler.edits import call_edited  # it is built on this module

            return call_edited(self, args, kwargs)
        module = self._ready()
        args, kwargs = self._prepare(args, kwargs)
        return module(*args, **kwargs)

    @property
    def _class_name(self) -> str:
        """The name of the wrapped module's class."""
        return type(self._wrapped).__name__

    def _ready(self) -> nn.Module:
        """The torch module with its weights loaded."""
        return self._wrapped

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the torch module's forward, from those given to `trace`. Needs no loaded weights."""
        return args, kwargs

    def _batch(self, given: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], options: Mapping[str, Any]) -> Batch:
        """The arguments of one forward for the inputs of several invokes, with what the trace itself was given.

        Raises:
            ModelError: they cannot share a forward.
        """
        from nnsight_compiler.models.batches import concatenated  # it brings torch's and the runtime's weight

        plain = {name: value for name, value in options.items() if name != "grad"}
        return concatenated(self._wrapped, [self._prepare(*each) for each in given], plain)

    def _is_untold(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it cannot be known here what this input becomes."""
        return False

    def _lengths(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        """How many tokens each of several prompts has, if they are a rectangle because the model's wrapper made it."""
        return ()

    def _needs_input(self) -> bool:
        """Whether a forward of the model is nothing without an input."""
        kinds = (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        )
        return any(one.kind in kinds and one.default is one.empty for one in self._forward_parameters().values())

    def _first_step(
        self, inputs: tuple[tuple[Any, ...], dict[str, Any]] | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of `trace` for what the first forward of a generation is given, from those of `generate`."""
        if inputs is None:
            return None
        return generation.first_step(self._wrapped, self._forward_parameters(), *inputs)

    def _prepare_generation(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the torch module's `generate`, from those given to `generate`."""
        own = getattr(self._wrapped, "generation_config", None)
        generation.check_configuration(kwargs.get("generation_config"), own)
        return args, kwargs

    def _example(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Small arguments on which a forward can be observed, where the kind of model tells them."""
        return None

    def _keywords(self) -> frozenset[str] | None:
        """The keywords that `trace` takes: those of the forward, and ours. `None` where the forward takes any."""
        named = {"grad"}
        for name, parameter in self._forward_parameters().items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                named.add(name)
            elif type(self._wrapped).__module__.startswith("transformers."):
                named |= _passed_on()  # what else its models are given, they ignore
            else:
                return None
        return frozenset(named)

    def _forward_parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters that the torch module's forward names."""
        return forward_parameters(self._wrapped)


def _elsewhere(method: str, names: Sequence[str]) -> str:
    return (
        f"`{method}` takes no {', '.join(names)} here: `remote=` is said in a trace of the experiment itself, or where"
        " it is called: `experiment(…, remote=True)`"
    )


def _passed_on() -> set[str]:
    """What the models of transformers understand beside the parameters that they name."""
    from transformers.utils.generic import TransformersKwargs

    return {*TransformersKwargs.__annotations__, "cache_position", "return_dict", "use_cache"}
