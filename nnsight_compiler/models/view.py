"""A module of a wrapped model, by its path: what `model.transformer.h[3].mlp` is, outside a trace and inside.

A view holds a path, not a module: the model may load its weights later, and its owner may replace a submodule, so the
torch module is looked up at each use. Looking up has no effects, except that a weight which is asked for as a value is
loaded first.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.models.aliases import INSIDE_A_TRACE
from nnsight_compiler.models.names import NoStandardModule, standard_names, stands_for
from nnsight_compiler.passes.sites import ATTENTION_VALUES

if TYPE_CHECKING:
    from nnsight_compiler.models.nnsight import NNsight
    from nnsight_compiler.models.source import OperationView, SourceView

_INDEXED = (nn.ModuleList, nn.Sequential)


class UnknownModuleError(ModelError, AttributeError):
    """A name that a module does not have."""


class ModuleIndexError(ModelError, IndexError):
    """An index past the end of a list of modules."""


class OutsideTraceError(ModelError, AttributeError):
    """A site's name (`.output`, `.input`, …), or an assignment, outside a trace."""


class NotAContainerError(ModelError, TypeError):
    """An index, a length or a loop on a module that has no items."""


class ModuleView:
    """A module of a wrapped model. Names and items are those of the torch module, then aliases, then standard names.

    Child modules come back as views, weights as tensors (loaded first where they are not yet), anything else as it is.
    `view["name"]` and `view["dotted.path"]` reach a submodule by name, also one whose name has another meaning here.
    """

    __slots__ = ("__weakref__", "_path", "_root")

    _root: NNsight
    _path: str

    def __init__(self, root: NNsight, path: str) -> None:
        if root is not self:  # a model is its own root, without holding itself
            object.__setattr__(self, "_root", root)
        object.__setattr__(self, "_path", path)

    @property
    def _module(self) -> Any:  # `Any`: containers have items and a length, which `nn.Module` does not declare
        """The torch module that stands at the path now."""
        return module_at(self._root, self._path)

    @property
    def _shown(self) -> str:
        """Where to look for names that exist, for messages."""
        return "`print(model)` shows the tree of its modules"

    # `Any`: what a name gives is known to the torch module alone.
    def __getattr__(self, name: str) -> Any:
        if name in ("_root", "_path", "_wrapped"):  # not yet set: asking the model for them would ask for them again
            raise AttributeError(name)
        return resolve(self._root, self._path, name)

    def __setattr__(self, name: str, value: object) -> None:
        """Attaches a module of the user's under a name that is free; anything else is refused."""
        path, module = _join(self._path, name), self._module
        free = path in self._root._attached or not (name in INSIDE_A_TRACE or hasattr(module, name))
        if not isinstance(value, nn.Module) or not free:
            _refuse_assignment(self, name)
        module.add_module(name, value)
        self._root._attach(path)

    def __delattr__(self, name: str) -> None:
        """Takes away a module that was attached; anything else is refused."""
        path = _join(self._path, name)
        if path not in self._root._attached:
            _refuse_assignment(self, name)
        delattr(self._module, name)
        self._root._attach(path, gone=True)

    def __getitem__(self, index: Any) -> Any:
        module = self._module
        if isinstance(module, _INDEXED) and not isinstance(index, str):
            names = list(module._modules)
            if isinstance(index, slice):
                return [self._child(name) for name in names[index]]
            try:
                return self._child(names[index])
            except IndexError:
                raise ModuleIndexError(
                    f"{describe(self)} holds {len(names)} modules: no index {index} (0 to {len(names) - 1})"
                    if names
                    else f"{describe(self)} is empty: no index {index}"
                ) from None
        if isinstance(index, str):
            return self._submodule(index)
        if not hasattr(module, "__getitem__"):
            raise NotAContainerError(f"{describe(self)} has no items; its children: {_listed(module._modules)}")
        return _present(self._root, self._path, lambda at: at[index])

    def _child(self, name: str) -> ModuleView:
        return view_at(self._root, _join(self._path, name))

    @property
    def source(self) -> SourceView:
        """The operations inside of its forward: to be printed, and inside a trace to be read and written."""
        from nnsight_compiler.models.source import SourceView  # it is built on this module

        return SourceView(self._root, self._path)

    def _attention(self, name: str) -> OperationView:
        """What attention computes here, by its name: `pattern`, `q`, …"""
        from nnsight_compiler.models.attention import NoAttention, attention_below  # as above
        from nnsight_compiler.models.source import OperationView

        try:
            below = attention_below(self._module, name)
        except NoAttention as error:
            raise UnknownModuleError(f"{describe(self)} has no `{name}`: {error}", name=name) from None
        return OperationView(self._root, f"{canonical_path(self._root, _join(self._path, below))}:{name}")

    def _submodule(self, name: str) -> Any:
        if ":" in name:
            from nnsight_compiler.models.source import OperationView  # as above

            return OperationView(self._root, _join(self._path, name))
        view: Any = self
        for part in name.split("."):
            module = view._module
            if module._modules.get(part) is not None:
                view = view._child(part)
            elif isinstance(module, nn.ParameterDict) and part in module:
                return _present(view._root, view._path, lambda at, part=part: at[part])
            else:
                found = named(view._root, view._path, part)
                if found is None:
                    raise _unknown(view._root, view._path, part)
                view = found
        return view

    def __len__(self) -> int:
        module = self._module
        if not hasattr(module, "__len__"):
            raise NotAContainerError(f"{describe(self)} has no length")
        return len(module)

    def __bool__(self) -> bool:
        return bool(self._module)

    def __iter__(self) -> Iterator[Any]:
        module = self._module
        if isinstance(module, _INDEXED):
            return iter(self[:])
        if not hasattr(module, "__iter__"):
            raise NotAContainerError(f"{describe(self)} cannot be looped over; `.children()` gives its children")
        return iter(_wrap(self._root, item) for item in module)

    def __contains__(self, item: object) -> bool:
        module = self._module
        if not (hasattr(module, "__contains__") or hasattr(module, "__iter__")):
            raise NotAContainerError(f"{describe(self)} has no items")
        return (item._module if isinstance(item, ModuleView) else item) in module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the torch module itself, with its weights loaded."""
        self._root._ready()
        return self._module(*args, **kwargs)

    def children(self) -> Iterator[ModuleView]:
        """The child modules, as views."""
        return (view for _, view in self.named_children())

    def named_children(self) -> Iterator[tuple[str, ModuleView]]:
        """The child modules as views, each with its name."""
        return ((name, self._child(name)) for name, _ in self._module.named_children())

    def modules(self) -> Iterator[ModuleView]:
        """This module and every module below it, as views."""
        return (view for _, view in self.named_modules())

    def named_modules(self) -> Iterator[tuple[str, ModuleView]]:
        """This module and every module below it as views, each with its path from here."""
        paths = {id(module): path for path, module in module_at(self._root, "").named_modules()}
        return ((name, view_at(self._root, paths[id(module)])) for name, module in self._module.named_modules())

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._module), *_given_names(self._root, self._path)})

    def __repr__(self) -> str:
        from nnsight_compiler.models.tree import draw

        return draw(self._module, aliases_of(self._root))

    def _repr_html_(self) -> str:
        from nnsight_compiler.html import modules_html

        return modules_html(self._module, aliases_of(self._root))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModuleView):
            return NotImplemented
        return self._root is other._root and self._path == other._path

    def __hash__(self) -> int:
        return hash((id(self._root), self._path))


def resolve(root: NNsight, path: str, name: str) -> Any:
    """What `name` is on the module at `path`: a view, a tensor, or any other attribute of the torch module.

    Raises:
        OutsideTraceError: `name` exists inside a trace only.
        UnknownModuleError: there is nothing of that name, standard names included.
    """
    module = module_at(root, path)
    if name in INSIDE_A_TRACE:
        own = f'; the module\'s own `{name}` is ["{name}"]' if hasattr(module, name) else ""
        raise OutsideTraceError(f"`.{name}` of {describe_at(root, path)} exists inside `with model.trace(…)` only{own}")
    if module._modules.get(name) is not None:
        return view_at(root, _join(path, name))
    if isinstance(module, nn.ModuleDict) and name in ("values", "items"):
        view = view_at(root, path)
        return view.children if name == "values" else view.named_children
    if hasattr(module, name):
        return _present(root, path, lambda at: getattr(at, name))
    found = named(root, path, name)
    if found is not None:
        return found
    if name in ATTENTION_VALUES:
        view_at(root, path)._attention(name)
        raise OutsideTraceError(f"`.{name}` of {describe_at(root, path)} exists inside `with model.trace(…)` only")
    raise _unknown(root, path, name)


def named(root: NNsight, path: str, name: str) -> ModuleView | None:
    """What an alias or a standard name means on the module at `path`; `None` where `name` is neither.

    Raises:
        UnknownModuleError: a standard name that no one module stands for.
    """
    relative = root._aliases.get(path, {}).get(name)
    if relative is None:
        try:
            relative = stands_for(module_at(root, path), name)
        except NoStandardModule as error:
            raise UnknownModuleError(f"{describe_at(root, path)}: {error}") from None
    return None if relative is None else view_at(root, _join(path, relative))


def aliases_of(root: NNsight) -> dict[nn.Module, Mapping[str, str]]:
    """The aliases by the module that they stand on."""
    return {module_at(root, path): names for path, names in root._aliases.items()}


def module_at(root: NNsight, path: str) -> nn.Module:
    """The torch module at `path` now."""
    try:
        return root._wrapped.get_submodule(path)
    except AttributeError:
        raise UnknownModuleError(f"{type(root._wrapped).__name__} no longer has a module at {path}") from None


def view_at(root: NNsight, path: str) -> ModuleView:
    """The view of the module at `path`, which may be any of its paths; the wrapped model itself at the empty one."""
    path = canonical_path(root, path)
    return ModuleView(root, path) if path else root


def canonical_path(root: NNsight, path: str) -> str:
    """The one path of a module that has several: the first in `named_modules` order."""
    target = module_at(root, path)
    return next((name for name, module in root._wrapped.named_modules() if module is target), path)


def describe(view: ModuleView) -> str:
    """`transformer.h (ModuleList)`: a view, for messages."""
    return describe_at(view._root, view._path)


def describe_at(root: NNsight, path: str) -> str:
    """`transformer.h (ModuleList)`: the module at `path`, for messages."""
    class_name = type(module_at(root, path)).__name__
    return f"{path} ({class_name})" if path else class_name


def _present(root: NNsight, path: str, get: Any) -> Any:
    """An attribute or item as users see it: weights loaded, modules of the tree as views.

    A method of the torch module (`to`, `eval`, `get_input_embeddings`) runs on the loaded module, not on the empty one
    that stands for it before; where it returns a module of the tree, that comes back as a view.
    """
    value = get(module_at(root, path))
    if inspect.ismethod(value) and value.__self__ is module_at(root, path):

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            root._ready()
            return _wrap(root, get(module_at(root, path))(*args, **kwargs))

        return method
    if isinstance(value, torch.Tensor) and value.is_meta:
        root._ready()
        value = get(module_at(root, path))
    return _wrap(root, value)


def _wrap(root: NNsight, value: Any) -> Any:
    if isinstance(value, nn.Module):
        for name, module in root._wrapped.named_modules():
            if module is value:
                return view_at(root, name)
    return value


def _unknown(root: NNsight, path: str, name: str) -> UnknownModuleError:
    module = module_at(root, path)
    own = [*module._modules, *module._parameters, *module._buffers]
    near = difflib.get_close_matches(name, [*own, *_given_names(root, path)], n=3, cutoff=0.5)
    hint = f"did you mean {_listed(near)}?" if near else f"it has: {_listed(own)}"
    return UnknownModuleError(f"{describe_at(root, path)} has no `{name}`; {hint}", name=name)


def _given_names(root: NNsight, path: str) -> list[str]:
    """The aliases and the standard names that a module has."""
    return [*root._aliases.get(path, {}), *standard_names(module_at(root, path))]


def _refuse_assignment(view: ModuleView, name: str) -> NoReturn:
    raise OutsideTraceError(
        f"`.{name}` of {describe(view)} cannot be set or deleted through a view: write to `.output` or `.input` inside"
        " `with model.trace(…)`, attach a module of your own under a name that is free, or change the torch module that"
        " was wrapped"
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _listed(names: Any) -> str:
    names = list(names)
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return shown or "nothing"
