"""Names of the nodes and values that surgery adds.

Passes that undo others, the branches and parity's probe find nodes by these names.

    LABEL/STEP           a node of a step, and its output; LABEL is MODULE, or MODULE/N for call N
    PARENT.q+k+v         the label of the fused product of PARENT.q, PARENT.k and PARENT.v
    MODULE/output        the output of a module whose product is part of a fused one
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from loradeploy.bundle.names import ADAPTER_MODE

if TYPE_CHECKING:
    import onnx_ir as ir

LORA_ADD: Final = "lora_add"  # y + (x A) B, of a product and of an embedding
LORA_A_GATHER: Final = "lora_A_gather"
LORA_B_GATHER: Final = "lora_B_gather"
LORA_A_MATMUL: Final = "lora_A_matmul"
LORA_B_MATMUL: Final = "lora_B_matmul"
SCALE_MUL: Final = "scale_mul"
OFFSET_ADD: Final = "offset_add"
SCALE_FRONT: Final = "unflatten"  # before the scale: moves the batch axis to the front
SCALE_BACK: Final = "flatten"  # after the offset: moves it back
HEAD_UNSQUEEZE: Final = "head_unsqueeze"
HEAD_PRODUCT: Final = "head_matmul"
HEAD_ADD: Final = "head_add"
HEAD_SQUEEZE: Final = "head_squeeze"
FUSED_SPLIT: Final = "split"

BRANCHES: Final = f"{ADAPTER_MODE}/If"

_JOINT: Final = "+"
_OUTPUT: Final = "/output"
_CALL: Final = re.compile(r"/\d+$")


def call_label(module: str, call: int) -> str:
    """The label of the nodes at a call of the module: the module itself for the first call."""
    return f"{module}/{call}" if call else module


def step_name(label: str, step: str) -> str:
    """The name of the node of `step` at `label`."""
    return f"{label}/{step}"


def is_step(node: ir.Node, *steps: str) -> bool:
    """Whether surgery added `node` for one of `steps`."""
    return str(node.name).endswith(tuple(f"/{step}" for step in steps))


def module_of_step(node: ir.Node) -> str | None:
    """The module, or the label of a fused product, that surgery named `node` after."""
    label, slash, _ = str(node.name or "").rpartition("/")
    return _CALL.sub("", label) if slash and not label.startswith("/") else None


def output_name(module: str) -> str:
    """The name of the output of `module`, a part of a fused product."""
    return f"{module}{_OUTPUT}"


def module_of_output(value: ir.Value) -> str | None:
    """The module whose output `value` is, as a part of a fused product; None for other values."""
    name = str(value.name)
    return name.removesuffix(_OUTPUT) if name.endswith(_OUTPUT) else None


def label_of(modules: Sequence[str]) -> str:
    """The label of a fused product: the names of its modules after their common parent path."""
    parent = modules[0].rpartition(".")[0]
    names = _JOINT.join(module.removeprefix(f"{parent}.") for module in modules)
    return f"{parent}.{names}" if parent else names


def modules_of_label(product: str) -> list[str]:
    """The modules in the label of a fused product; the label itself for a single module."""
    parent, dot, names = product.rpartition(".")
    return [f"{parent}{dot}{name}" for name in names.split(_JOINT)]


def weight_name(module: str) -> str:
    """The name of the weight of a module, or of the product with this label."""
    return f"{module}.weight"


def packed_names(weight: str, bits: int) -> list[str]:
    """The names of a weight in few bits, its scales and its zero points."""
    return [f"{weight}.int{bits}{part}" for part in ("", ".scales", ".zeros")]
