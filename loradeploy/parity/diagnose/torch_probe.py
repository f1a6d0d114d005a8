"""Records the inputs and outputs of a PyTorch model's modules on one input, by hooks.

A site is a tensor inside the model. Modules that pass on the same tensor share a site: an attention
module and its last submodule `o_proj`, a block and the norm that takes its output.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Run = Callable[[], object]


@dataclass(frozen=True)
class Site:
    """A tensor of `shape` inside the model.

    `given_by`: the modules that return it, the innermost first. `taken_by`: the modules without
    submodules that take it as input. One of the two may be empty.
    """

    given_by: tuple[str, ...]
    taken_by: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Modules:
    """The names of the base model's modules, before an adapter: all, and those without children."""

    names: tuple[str, ...]
    leaves: frozenset[str]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Modules:
        """Return the modules of `model`, in order of registration."""
        named = {name: module for name, module in model.named_modules() if name}
        leaves = (name for name, module in named.items() if not any(module.children()))
        return cls(tuple(named), frozenset(leaves))


def sites_of(model: torch.nn.Module, modules: Modules, run: Run) -> tuple[Site, ...]:
    """Return the sites of one `run` of `model`, in order of computation.

    If a module is called several times, the last call counts.
    """
    found: list[_Found] = []
    known: dict[int, tuple[weakref.ref[Any], _Found]] = {}

    def site(tensor: torch.Tensor) -> _Found:
        entry = known.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        found.append(_Found(tuple(tensor.shape)))
        known[id(tensor)] = (weakref.ref(tensor), found[-1])
        return found[-1]

    def taken(name: str, tensor: torch.Tensor) -> None:
        site(tensor).taken_by.append(name)

    def given(name: str, tensor: torch.Tensor) -> None:
        site(tensor).given_by.append(name)

    with _hooked(model, modules.leaves, modules.names, taken, given):
        run()
    last = {each.label(): each for each in found}
    return tuple(
        Site(tuple(each.given_by), tuple(each.taken_by), each.shape) for each in last.values()
    )


def values_at(model: torch.nn.Module, sites: Sequence[Site], run: Run) -> list[NDArray[np.float32]]:
    """Return the values at `sites` in one `run` of `model`, as float32 in the sites' shapes."""
    places = {_label(site.given_by, site.taken_by): number for number, site in enumerate(sites)}
    values: dict[int, NDArray[np.float32]] = {}

    def keep(kind: str) -> Callable[[str, torch.Tensor], None]:
        def hook(name: str, tensor: torch.Tensor) -> None:
            number = places.get((kind, name))
            if number is not None:
                values[number] = tensor.detach().float().cpu().numpy().copy()

        return hook

    names = {kind: [name for of, name in places if of == kind] for kind in ("in", "out")}
    with _hooked(model, names["in"], names["out"], keep("in"), keep("out")):
        run()
    return [values[number] for number in range(len(sites))]


@contextmanager
def rounded(model: torch.nn.Module, modules: Modules, unit: float, seed: int) -> Iterator[None]:
    """Perturb `model` by as much as rounding would, while the block lasts.

    Inputs and outputs of modules without children are multiplied by 1 + `unit` · ξ, ξ uniform in
    [−1, 1]. The resulting change of a value measures its conditioning (Monte Carlo arithmetic).
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def disturbed(value: Any) -> Any:
        if not _is_float(value):
            return value
        noise = torch.rand(value.shape, generator=generator).to(value) * 2 - 1
        return value + unit * noise * value

    def before(_: object, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(map(disturbed, given))

    def after(_: object, __: object, given: Any) -> Any:
        return disturbed(given)

    with ExitStack() as hooks:
        for name in sorted(modules.leaves):
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(before).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        yield


@dataclass(eq=False)
class _Found:
    """A site under construction during a run."""

    shape: tuple[int, ...]
    given_by: list[str] = field(default_factory=list)
    taken_by: list[str] = field(default_factory=list)

    def label(self) -> tuple[str, str]:
        return _label(self.given_by, self.taken_by)


def _label(given_by: Sequence[str], taken_by: Sequence[str]) -> tuple[str, str]:
    """Return the hook that records a site: ("out" or "in", module)."""
    return ("out", given_by[0]) if given_by else ("in", taken_by[0])


@contextmanager
def _hooked(
    model: torch.nn.Module,
    takers: Collection[str],
    givers: Collection[str],
    taken: Callable[[str, torch.Tensor], None],
    given: Callable[[str, torch.Tensor], None],
) -> Iterator[None]:
    """Call `taken` and `given` with the first float tensor that modules take and return."""

    def before(name: str) -> Callable[..., None]:
        def hook(_: object, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            tensor = _first((*positional, *named.values()))
            if tensor is not None:
                taken(name, tensor)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: object, __: object, result: Any) -> None:
            tensor = _first(result)
            if tensor is not None:
                given(name, tensor)

        return hook

    with ExitStack() as hooks:
        for name in takers:
            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(before(name), with_kwargs=True)
            hooks.callback(handle.remove)
        for name in givers:
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_hook(after(name)).remove)
        yield


def _first(value: Any) -> torch.Tensor | None:
    if _is_float(value):
        tensor: torch.Tensor = value
        return tensor
    parts: Any = ()
    if isinstance(value, Mapping):  # such as transformers' outputs
        parts = value.values()
    elif isinstance(value, tuple | list):
        parts = value
    return next((found for part in parts if (found := _first(part)) is not None), None)


def _is_float(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_floating_point()
