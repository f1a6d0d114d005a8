"""The reference model computed in other numbers: what rounding alone does to it.

Weights are cast as their module runs and given back afterwards, so that one module of each shape is
held twice at most, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

# What a precision's gap is taken to. float32 is compared with float64: both are in PyTorch, so that
# nothing but rounding is between them.
DTYPES: Final[Mapping[str, str]] = {"fp32": "float64", "fp16": "float16", "bf16": "bfloat16"}
# The largest weight, in values, whose memory is used again for the next of its shape.
_KEPT: Final = 1 << 24


@dataclass(frozen=True)
class Activations:
    """How a product rounds what it multiplies: to 8 bits, in blocks of `block` or all at once."""

    block: int | None


@contextmanager
def in_dtype(model: torch.nn.Module, name: str) -> Iterator[None]:
    """`model` with its parameters and, from its embeddings on, its activations in another dtype.

    Embeddings of images and sounds are convolutions, which cast what they are given. What a model
    computes in float32 by its own decision (norms, rotations) stays so.
    """
    import torch

    dtype: torch.dtype = getattr(torch, name)
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    kept: dict[torch.nn.Module, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
    room = _Room(dtype)

    def cast(module: torch.nn.Module, inputs: Any) -> Any:
        to = room.cast if type(module) is torch.nn.Linear else _to(dtype)
        own = kept[module] = []
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                data = parameter.data
                parameter.data = to(data)
                own.append((parameter, data))

    def give_back(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        for parameter, data in kept.pop(module, ()):
            if type(module) is torch.nn.Linear:
                room.give_back(parameter.data)
            parameter.data = data

    def cast_input(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> Any:
        return tuple(given.to(dtype) for given in inputs)

    def cast_output(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(dtype)

    with ExitStack() as hooks:
        for module in model.modules():
            if type(module) is torch.nn.Embedding and module.max_norm is None:
                # The rows that are looked up, in place of a whole vocabulary's.
                hooks.callback(module.register_forward_hook(cast_output).remove)
            elif any(True for _ in module.parameters(recurse=False)):
                hooks.callback(module.register_forward_pre_hook(cast).remove)
                if isinstance(module, convolutions):
                    hooks.callback(module.register_forward_pre_hook(cast_input).remove)
                after = module.register_forward_hook(give_back, always_call=True)
                hooks.callback(after.remove)
        yield


def _to(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda values: values.to(dtype)


class _Room:
    """Memory for the cast weights of linear layers, which are of few shapes, one for each.

    Their outputs never share it, as those of other modules may, and writing where something was
    written before is several times as fast as in memory that is new.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._free: dict[torch.Size, torch.Tensor] = {}

    def cast(self, values: torch.Tensor) -> torch.Tensor:
        """`values` in the other dtype, until they are given back."""
        import torch

        made = self._free.pop(values.shape, None)
        if made is None:
            with torch.inference_mode(False):  # what is made inside it cannot be written outside
                made = torch.empty_like(values, dtype=self._dtype)
        with torch.no_grad():
            return made.copy_(values)

    def give_back(self, values: torch.Tensor) -> None:
        """Take back what `cast` gave; what is large, as a head of a vocabulary, is not kept."""
        if values.numel() <= _KEPT:
            self._free[values.shape] = values


@contextmanager
def rounded_activations(
    model: torch.nn.Module, activations: Mapping[str, Activations]
) -> Iterator[None]:
    """`model` with the inputs of some modules rounded to 8 bits, as quantized products do it."""
    modules: dict[str, Any] = dict(model.named_modules())
    with ExitStack() as hooks:
        for name, how in activations.items():
            module = modules[name]
            # An adapted module's own update is computed from what was not rounded.
            base = getattr(module, "base", module)
            hooks.callback(base.register_forward_pre_hook(_rounding(how)).remove)
        yield


def _rounding(how: Activations) -> Callable[[torch.nn.Module, Any], Any]:
    def pre_hook(module: torch.nn.Module, inputs: Any) -> Any:
        return (round_to_8_bits(inputs[0], how.block), *inputs[1:])

    return pre_hook


def round_to_8_bits(x: torch.Tensor, block: int | None) -> torch.Tensor:
    """`x` [..., size] on 255 levels around zero: of each block of the last axis, or of all."""
    import torch

    size = x.shape[-1]
    if block is None:
        return _levels(x.reshape(1, -1)).reshape(x.shape)
    padded = torch.nn.functional.pad(x, (0, -size % block))
    blocks = padded.reshape(*x.shape[:-1], -1, block)
    return _levels(blocks).flatten(-2)[..., :size]


def _levels(x: torch.Tensor) -> torch.Tensor:
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    step = step.where(step > 0, step.new_ones(()))
    return (x / step).round() * step
