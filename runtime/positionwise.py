"""Which modules treat every position by itself, proved by the operations that their forward runs.

The forward runs on a shadow, on fakes of several positions, and each operation is looked at: which dimensions of what
it gives are positions, and whether each position of it depends on the same position of what was given alone. So a norm
of any family and a container of such modules are proved as `nn.Linear` is, and an operation of which this is not known
refutes. The forward is then run on other numbers of dimensions of positions, and must run the same operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nnsight_compiler.runtime.likeness import Alike
from nnsight_compiler.runtime.shadow import HOOKS, Fakes, shadowed, tensors_in, tensors_of

_LEADS: tuple[tuple[int, ...], ...] = ((3, 5), (7,), ())
"""The positions on which a forward is run: in rows and tokens, in one dimension, and a single one."""

_RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze"})
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "argmax", "argmin"})
_ALONG = frozenset({"_softmax", "_log_softmax", "slice", "select", "split", "split_with_sizes", "cat"})
"""Operations along one dimension."""
_SAME = frozenset({"clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous"})
_PRODUCTS = frozenset({"mm", "addmm", "linear", "mv", "addmv", "t", "transpose"})
"""How a product with a weight is spelled, which depends on the number of dimensions."""


class _NotProvedError(Exception):
    """Why a forward is not known to treat positions apart."""


_known: WeakKeyDictionary[nn.Module, dict[Any, str | None]] = WeakKeyDictionary()
_alike: Alike[str | None] = Alike()


def why_not_positionwise(module: nn.Module, width: int, dtype: torch.dtype) -> str | None:
    """Why a module, given tensors whose last dimension is of this width, may not be run on some of the positions alone
    instead of on all; `None` where it may."""
    if hooked(module):
        return "it has hooks, or a forward of its own"
    key = width, dtype, _mode(module)
    held = _known.setdefault(module, {})
    if key not in held:
        held[key] = _alike.find(module, (width, dtype), lambda: _prove(module, width, dtype), _is_proof)
    return held[key]


def _is_proof(found: str | None) -> bool:
    return found is None


def hooked(module: nn.Module) -> bool:
    """Whether more than the forwards of their classes runs where a module, or one inside of it, is called."""
    return any(
        "forward" in vars(part) or any(vars(part).get(name) for name in HOOKS) for part in module.modules()
    ) or bool(torch.nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def condition(root: nn.Module, path: str) -> tuple[Any, ...]:
    """What may change in a module of a model while it lives and decides whether it may be run on parts, or a product
    with its weights stand for it: their gradients count where the rest of the model is frozen."""
    module = root.get_submodule(path)
    frozen = next((not each.requires_grad for each in root.parameters()), None)
    return frozen, tuple(each.requires_grad for each in module.parameters()), _mode(module)


def _mode(module: nn.Module) -> tuple[Any, ...]:
    return hooked(module), tuple((type(part), part.training) for part in module.modules())


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _prove(module: nn.Module, width: int, dtype: torch.dtype) -> str | None:
    try:
        ran = [_Watch(lead).run(module, width, dtype) for lead in _LEADS]
    except _NotProvedError as error:
        return str(error)
    except Exception as error:  # whatever the module's code raises on tensors without numbers
        return f"its forward cannot be followed: {type(error).__name__}"
    if any(each != ran[0] for each in ran):
        return "what it computes depends on how many dimensions it is given"
    return None


@final
class _Watch(TorchDispatchMode):
    """Follows which dimensions are positions through the operations of one forward.

    leads: for each tensor that depends on what was given, its first dimensions, which are positions.
    names: the operations that ran, but for those that only arrange what is there.
    """

    def __init__(self, lead: tuple[int, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lead = lead
        self.leads: dict[int, tuple[int, ...]] = {}
        self.names: list[str] = []
        self.held: list[Any] = []
        self.kept: set[int] = set()

    def run(self, module: nn.Module, width: int, dtype: torch.dtype) -> list[str]:
        """The operations of a forward, each of which treats positions apart."""
        fakes = Fakes(module, (), {})
        shadow = shadowed(module, fakes)
        before = [dict(vars(part)) for part in shadow.modules()]
        with torch.inference_mode(False), torch.no_grad(), fakes.running():
            given = torch.empty(*self.lead, width, dtype=dtype, device=fakes.device)
            self._note(given, self.lead)
            self.kept = {_storage(tensor) for tensor in (given, *tensors_of(shadow))}
            with self:
                made = shadow(given)
        if [dict(vars(part)) for part in shadow.modules()] != before:
            raise _NotProvedError("its forward changes what it holds")
        if not isinstance(made, torch.Tensor):
            raise _NotProvedError("it does not return a tensor")
        if _storage(made) == _storage(given):
            raise _NotProvedError("it gives back what it was given")
        if self.leads.get(id(made)) != self.lead or made.dim() != len(self.lead) + 1:
            raise _NotProvedError("it does not return one vector for each position")
        return self.names

    def _note(self, value: Any, lead: tuple[int, ...]) -> None:
        self.held.append(value)  # so that no other tensor comes to have its id
        self.leads[id(value)] = lead

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self.held.append(made)
        name = func._schema.name.partition("::")[2]
        given = [each for each in tensors_in((args, kwargs)) if id(each) in self.leads]
        if func._schema.name.startswith("prim::"):
            return made  # it asks of what kind a tensor is
        if func._schema.is_mutable:
            # What it made itself it may change.
            written = args[0] if name.endswith("_") and args else None
            if not isinstance(written, torch.Tensor) or _storage(written) in self.kept or (
                given and id(written) not in self.leads
            ):  # fmt: skip
                raise _NotProvedError(f"its forward writes in place (`{name}`)")
            made, name = written, name.rstrip("_")
        if given:
            if torch.Tag.nondeterministic_seeded in func.tags:
                raise _NotProvedError(f"its forward draws at random (`{name}`)")
            if name not in _RESHAPES | _SAME:
                self.names.append("product" if name in _PRODUCTS else name)
            self._follow(name, func, args, kwargs, given, made)
        elif torch.Tag.nondeterministic_seeded in func.tags:
            raise _NotProvedError(f"its forward draws at random (`{name}`)")
        return made

    def _follow(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: list[Any], made: Any
    ) -> None:
        lead = self.leads[id(given[0])]
        apart = all(self.leads[id(each)] == lead for each in given)
        rest = [each for each in tensors_in((args, kwargs)) if id(each) not in self.leads]
        if not lead and not self.lead:
            self._all(made, ())  # there is one position only
        elif apart and (rule := self._rule(name, func)) is not None and rule(name, args, kwargs, given, rest, made):
            pass
        else:
            raise _NotProvedError(f"it is not known that `{name}` treats positions apart here")

    def _rule(self, name: str, func: Any) -> Callable[..., bool] | None:
        if name in _RESHAPES:
            return self._reshape
        if name in _REDUCTIONS:
            return self._reduce
        if name in _ALONG:
            return self._along
        if name in ("mm", "addmm", "linear"):
            return self._product
        if name in ("native_layer_norm", "_fused_rms_norm"):
            return self._norm
        if name in _SAME or torch.Tag.pointwise in func.tags:
            return self._pointwise
        return None

    def _all(self, made: Any, lead: tuple[int, ...]) -> bool:
        for each in tensors_in(made):
            if tuple(each.shape[: len(lead)]) != lead:
                return False
            self._note(each, lead)
        return True

    def _reshape(self, name: str, args: Any, kwargs: Any, given: list[Any], rest: list[Any], made: Any) -> bool:
        shape, count = tuple(made.shape), math.prod(self.lead)
        for lead in (self.lead, (count,)):
            if shape[: len(lead)] == lead:
                self._note(made, lead)
                return True
        return False

    def _reduce(self, name: str, args: Any, kwargs: Any, given: list[Any], rest: list[Any], made: Any) -> bool:
        place = 2 if name in ("linalg_vector_norm", "norm") else 1
        dims = args[place] if len(args) > place else kwargs.get("dim")
        return self._among_features(dims, given[0]) and self._all(made, self.leads[id(given[0])])

    def _along(self, name: str, args: Any, kwargs: Any, given: list[Any], rest: list[Any], made: Any) -> bool:
        place = 2 if name in ("split", "split_with_sizes") else 1
        dim = args[place] if len(args) > place else kwargs.get("dim", 0)
        return not rest and self._among_features(dim, given[0]) and self._all(made, self.leads[id(given[0])])

    def _among_features(self, dims: Any, tensor: torch.Tensor) -> bool:
        named: Iterable[Any] = (dims,) if isinstance(dims, int) else dims or ()
        places = [dim % tensor.dim() for dim in named]
        return bool(places) and min(places) >= len(self.leads[id(tensor)])

    def _product(self, name: str, args: Any, kwargs: Any, given: list[Any], rest: list[Any], made: Any) -> bool:
        left = args[1] if name == "addmm" else args[0]
        lead = self.leads.get(id(left))
        vectors = given == [left] and lead is not None and left.dim() == len(lead) + 1
        broadcast = name != "addmm" or args[0].dim() == 1
        return vectors and broadcast and lead is not None and self._all(made, lead)

    def _norm(self, name: str, args: Any, kwargs: Any, given: list[Any], rest: list[Any], made: Any) -> bool:
        lead = self.leads.get(id(args[0]))
        if len(given) != 1 or lead is None or len(args[1]) > args[0].dim() - len(lead):
            return False
        return self._all(made, lead)

    def _pointwise(self, name: str, args: Any, kwargs: Any, given: list[Any], rest: list[Any], made: Any) -> bool:
        lead = self.leads[id(given[0])]
        if any(each.dim() != made.dim() for each in given):
            return False
        features = made.dim() - len(lead)
        alike = all(math.prod(each.shape[: max(each.dim() - features, 0)]) == 1 for each in rest)
        return alike and self._all(made, lead)
