"""Runs the reference model in another dtype or with rounded activations, to measure rounding.

Weights are cast while their module runs and restored afterwards, so that the additional memory is
at most one module of each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

# The dtype that float32 is compared with to measure the gap of a precision. Both run in PyTorch, so
# that they differ by rounding only.
DTYPES: Final[Mapping[str, str]] = {"fp32": "float64", "fp16": "float16", "bf16": "bfloat16"}
# The largest weight, in values, whose memory is reused for the next one of its shape.
_KEPT: Final = 1 << 24
# How transformers runs experts, as a config has it. The property of it also sets nested configs.
_EXPERTS: Final = "_experts_implementation_internal"


@dataclass(frozen=True)
class Activations:
    """How a product rounds its activations to 8 bits: in blocks of `block`, or whole (None)."""

    block: int | None


@contextmanager
def in_dtype(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Run `model` with its parameters and its activations in another dtype while the block lasts.

    Embeddings cast their outputs, convolutions (of images and sounds) and linear layers their
    inputs; in float64, all modules with parameters do. What the model itself computes in float32
    (norms, rotary embeddings) stays in float32.
    """
    import torch

    from loradeploy.lora.layers.linear import LoraLinear

    dtype: torch.dtype = getattr(torch, name)
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    products = (*convolutions, torch.nn.Linear, LoraLinear)
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

    def cast_input(module: torch.nn.Module, inputs: tuple[Any, ...]) -> Any:
        return tuple(
            given.to(dtype) if torch.is_tensor(given) and given.is_floating_point() else given
            for given in inputs
        )

    def cast_output(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(dtype)

    with ExitStack() as hooks:
        if dtype == torch.float64:
            _run_experts_one_by_one(model, hooks)
        for module in model.modules():
            if type(module) is torch.nn.Embedding and module.max_norm is None:
                # Cast the selected rows, not the weights of a whole vocabulary.
                hooks.callback(module.register_forward_hook(cast_output).remove)
            elif any(True for _ in module.parameters(recurse=False)):
                hooks.callback(module.register_forward_pre_hook(cast).remove)
                # T5 casts what some layers read to the dtype of their weights, float32 until then.
                if isinstance(module, products) or dtype == torch.float64:
                    hooks.callback(module.register_forward_pre_hook(cast_input).remove)
                after = module.register_forward_hook(give_back, always_call=True)
                hooks.callback(after.remove)
        yield


def _run_experts_one_by_one(model: torch.nn.Module, until: ExitStack) -> None:
    """Let transformers run experts as separate products: its grouped product takes no float64."""
    configs = {
        id(config): config for m in model.modules() if (config := getattr(m, "config", None))
    }
    for config in configs.values():
        chosen = getattr(config, _EXPERTS, None)
        if chosen is not None:
            setattr(config, _EXPERTS, "eager")
            until.callback(setattr, config, _EXPERTS, chosen)


def _to(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda values: values.to(dtype)


class _Room:
    """Buffers for the cast weights of linear layers, one for each shape.

    The outputs of linear layers never alias their weights, as those of other modules may. Writing
    into a used buffer is several times as fast as into newly allocated memory.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._free: dict[torch.Size, torch.Tensor] = {}

    def cast(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values` in the other dtype, in a buffer that `give_back` returns."""
        import torch

        made = self._free.pop(values.shape, None)
        if made is None:
            with torch.inference_mode(False):  # inference tensors cannot be written outside of it
                made = torch.empty_like(values, dtype=self._dtype)
        with torch.no_grad():
            return made.copy_(values)

    def give_back(self, values: torch.Tensor) -> None:
        """Keep a buffer of `cast` for reuse, unless it is large, such as that of an output head."""
        if values.numel() <= _KEPT:
            self._free[values.shape] = values


@contextmanager
def rounded_activations(
    model: torch.nn.Module, activations: Mapping[str, Activations]
) -> Iterator[None]:
    """Round the inputs of some modules to 8 bits, as quantized products do, in this block."""
    modules: dict[str, Any] = dict(model.named_modules())
    with ExitStack() as hooks:
        for name, how in activations.items():
            module = modules[name]
            # The update of an adapted module is computed from its inputs before rounding.
            base = getattr(module, "base", module)
            hooks.callback(base.register_forward_pre_hook(_rounding(how)).remove)
        yield


def _rounding(how: Activations) -> Callable[[torch.nn.Module, Any], Any]:
    def pre_hook(module: torch.nn.Module, inputs: Any) -> Any:
        return (round_to_8_bits(inputs[0], how.block), *inputs[1:])

    return pre_hook


def round_to_8_bits(x: torch.Tensor, block: int | None) -> torch.Tensor:
    """Round `x` [..., size] to 255 levels around zero, per block of the last axis or per tensor."""
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
