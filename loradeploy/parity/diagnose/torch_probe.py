"""What the modules of a PyTorch model give and take on one input, by hooks.

A site is a tensor on the way through the model. Modules that hand on the same tensor are of one
site: an attention that ends in its `o_proj`, the norm that takes what the block before gave.
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
    """A tensor of `shape`.

    `given_by`: the modules that give it, the innermost first. `taken_by`: those without modules of
    their own that take it. One of the two may be empty.
    """

    given_by: tuple[str, ...]
    taken_by: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Modules:
    """The modules of a model before anything was put into it: all, and those without children."""

    names: tuple[str, ...]
    leaves: frozenset[str]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Modules:
        """The modules of `model`, in the order of their registration."""
        named = {name: module for name, module in model.named_modules() if name}
        leaves = (name for name, module in named.items() if not any(module.children()))
        return cls(tuple(named), frozenset(leaves))


def sites_of(model: torch.nn.Module, modules: Modules, run: Run) -> tuple[Site, ...]:
    """The sites of one `run` of `model`, in the order in which they come to be.

    Of a module that is called several times, the last call counts.
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
    """The values at `sites` in one `run` of `model`, float32 and in the sites' shapes."""
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
    """Disturb `model` by as much as rounding would, while the block lasts.

    What modules without children take and give is multiplied by 1 + `unit` · ξ, ξ uniform in
    [−1, 1]. How far the model's values move by it is how ill-conditioned they are (Monte Carlo
    arithmetic).
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
    """A site while a run goes on."""

    shape: tuple[int, ...]
    given_by: list[str] = field(default_factory=list)
    taken_by: list[str] = field(default_factory=list)

    def label(self) -> tuple[str, str]:
        return _label(self.given_by, self.taken_by)


def _label(given_by: Sequence[str], taken_by: Sequence[str]) -> tuple[str, str]:
    """The hook by which a site is seen."""
    return ("out", given_by[0]) if given_by else ("in", taken_by[0])


@contextmanager
def _hooked(
    model: torch.nn.Module,
    takers: Collection[str],
    givers: Collection[str],
    taken: Callable[[str, torch.Tensor], None],
    given: Callable[[str, torch.Tensor], None],
) -> Iterator[None]:
    """Tell of the first tensor of numbers that each module takes and gives."""

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
    if isinstance(value, Mapping):  # transformers' outputs are
        parts = value.values()
    elif isinstance(value, tuple | list):
        parts = value
    return next((found for part in parts if (found := _first(part)) is not None), None)


def _is_float(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_floating_point()
