"""What becomes of every input and attribute of the operators that an export rewrites or reads.

A node is changed, or numbers are read from it, only where all that it has is in this table: an
input or attribute that is not, such as one of a later version of the operator, is refused by name.

CARRIED    stays at the node, or goes to the one that takes its place
HONORED    its value is taken into account, and may be another afterwards
REFUSED    where it is given, and is not the value in `refused`, the node is refused by name
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from loradeploy.errors import ExportError, listed_names

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT: Final = "com.microsoft"
GROUP_QUERY_ATTENTION: Final = "GroupQueryAttention"


class Treatment(Enum):
    """What becomes of an input or attribute."""

    CARRIED = "carried over"
    HONORED = "honored"
    REFUSED = "refused"


CARRIED, HONORED, REFUSED = Treatment


@dataclass(frozen=True)
class Operator:
    """The inputs of an operator, in their order, and its attributes.

    `refused`: values of refused attributes that say what leaving them out says; of others any is
    too much.
    """

    inputs: Mapping[str, Treatment]
    attributes: Mapping[str, Treatment] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=dict)


def _norm(*inputs: str, **attributes: Treatment) -> Operator:
    return Operator(dict.fromkeys(inputs, CARRIED), {"epsilon": CARRIED, **attributes})


_CONV: Final = Operator(
    {"X": CARRIED, "W": HONORED, "B": HONORED},
    {
        **dict.fromkeys(("auto_pad", "dilations", "kernel_shape", "pads", "strides"), CARRIED),
        "group": HONORED,
    },
)
_DEQUANTIZE: Final = Operator(
    {"x": HONORED, "x_scale": HONORED, "x_zero_point": HONORED},
    {"axis": HONORED, "block_size": HONORED, "output_dtype": HONORED},
)
_MATMUL: Final = Operator({"A": CARRIED, "B": HONORED})
_AXIS_AND_TYPE: Final = {"axis": CARRIED, "stash_type": CARRIED}

OPERATORS: Final[Mapping[tuple[str, str], Operator]] = MappingProxyType(
    {
        # -- products (products.py, merge.py, quantize.py, fuse.py, heads.py) ------------------
        ("", "MatMul"): _MATMUL,
        # scaled and turned ones are made plain first (normalize.py)
        ("", "Gemm"): Operator(
            {"A": CARRIED, "B": HONORED, "C": HONORED},
            dict.fromkeys(("alpha", "beta", "transA", "transB"), HONORED),
        ),
        (MICROSOFT, "FusedGemm"): Operator(
            {"A": CARRIED, "B": HONORED, "C": HONORED},
            {
                **dict.fromkeys(("activation", "alpha", "beta", "transA", "transB"), HONORED),
                **dict.fromkeys(
                    ("activation_alpha", "activation_beta", "activation_gamma"), REFUSED
                ),
            },
        ),
        (MICROSOFT, "FusedMatMul"): Operator(
            {"A": HONORED, "B": HONORED},
            {
                **dict.fromkeys(("alpha", "transA", "transB"), HONORED),
                **dict.fromkeys(("transBatchA", "transBatchB"), REFUSED),
            },
            {"transBatchA": 0, "transBatchB": 0},
        ),
        # g_idx is read, and gone once a weight is packed again, in blocks of its own
        (MICROSOFT, "MatMulNBits"): Operator(
            {
                "A": CARRIED,
                "B": HONORED,
                "scales": HONORED,
                "zero_points": HONORED,
                "g_idx": HONORED,
                "bias": HONORED,
            },
            {
                **dict.fromkeys(("K", "N", "bits", "block_size"), HONORED),
                "accuracy_level": CARRIED,
                "weight_prepacked": REFUSED,
            },
            {"weight_prepacked": 0},
        ),
        ("", "MatMulInteger"): Operator(
            {"A": CARRIED, "B": HONORED, "a_zero_point": CARRIED, "b_zero_point": HONORED}
        ),
        (MICROSOFT, "DynamicQuantizeMatMul"): Operator(
            {
                "A": CARRIED,
                "B": HONORED,
                "b_scale": HONORED,
                "b_zero_point": HONORED,
                "bias": HONORED,
            }
        ),
        (MICROSOFT, "MatMulIntegerToFloat"): Operator(
            {
                "A": CARRIED,
                "B": HONORED,
                "a_scale": CARRIED,
                "b_scale": HONORED,
                "a_zero_point": CARRIED,
                "b_zero_point": HONORED,
                "bias": HONORED,
            }
        ),
        # -- what stands between a weight and its product --------------------------------------
        ("", "DequantizeLinear"): _DEQUANTIZE,
        (MICROSOFT, "DequantizeLinear"): _DEQUANTIZE,
        ("", "Cast"): Operator(
            {"input": HONORED}, {"to": HONORED, "saturate": CARRIED, "round_mode": CARRIED}
        ),
        ("", "Identity"): Operator({"input": HONORED}),
        ("", "Transpose"): Operator({"data": HONORED}, {"perm": HONORED}),
        # -- layers that are no products (parts.py) --------------------------------------------
        ("", "Gather"): Operator({"data": HONORED, "indices": HONORED}, {"axis": HONORED}),
        ("", "Conv"): _CONV,
        ("", "LayerNormalization"): _norm("X", "Scale", "B", **_AXIS_AND_TYPE),
        ("", "RMSNormalization"): _norm("X", "scale", **_AXIS_AND_TYPE),
        ("", "SimplifiedLayerNormalization"): _norm("X", "scale", **_AXIS_AND_TYPE),
        ("", "GroupNormalization"): _norm(
            "X", "scale", "bias", num_groups=CARRIED, stash_type=CARRIED
        ),
        ("", "BatchNormalization"): Operator(
            dict.fromkeys(("X", "scale", "B", "input_mean", "input_var"), CARRIED),
            {"epsilon": CARRIED, "momentum": CARRIED, "training_mode": REFUSED},
            {"training_mode": 0},
        ),
        (MICROSOFT, "SkipLayerNormalization"): _norm("input", "skip", "gamma", "beta", "bias"),
        (MICROSOFT, "SkipSimplifiedLayerNormalization"): _norm("input", "skip", "gamma", "bias"),
        # -- attention, where GroupQueryAttention takes its place (gqa.py) ----------------------
        ("", "Attention"): Operator(
            {
                **dict.fromkeys(("Q", "K", "V", "attn_mask"), HONORED),
                **dict.fromkeys(("past_key", "past_value", "nonpad_kv_seqlen"), REFUSED),
            },
            {
                **dict.fromkeys(("scale", "softcap"), CARRIED),
                # sizes are read off the values, which have their heads apart
                **dict.fromkeys(("q_num_heads", "kv_num_heads"), HONORED),
                **dict.fromkeys(
                    ("is_causal", "qk_matmul_output_mode", "softmax_precision"), REFUSED
                ),
            },
            # 1 is float32, in which GroupQueryAttention computes its softmax
            {"is_causal": 0, "qk_matmul_output_mode": 0, "softmax_precision": 1},
        ),
        ("", "RotaryEmbedding"): Operator(
            dict.fromkeys(("X", "cos_cache", "sin_cache", "position_ids"), CARRIED),
            {"interleaved": CARRIED, "rotary_embedding_dim": CARRIED, "num_heads": HONORED},
        ),
        (MICROSOFT, "RotaryEmbedding"): Operator(
            dict.fromkeys(("input", "position_ids", "cos_cache", "sin_cache"), CARRIED),
            {
                **dict.fromkeys(
                    ("interleaved", "is_packed_batching", "rotary_embedding_dim", "scale"), CARRIED
                ),
                "num_heads": HONORED,
            },
        ),
    }
)

# Operators that have the weights of layers, and take no adapters: nothing of them is rewritten.
UNREACHED: Final = frozenset(
    {
        ("", "ConvInteger"),
        ("", "QLinearConv"),
        ("", "QLinearMatMul"),
        *((MICROSOFT, "Attention"), (MICROSOFT, "QAttention"), (MICROSOFT, "DecoderAttention")),
        *((MICROSOFT, "PackedAttention"), (MICROSOFT, "LongformerAttention")),
        *((MICROSOFT, "DecoderMaskedSelfAttention"), (MICROSOFT, "QOrderedAttention")),
        *((MICROSOFT, "QOrderedLongformerAttention"), (MICROSOFT, "QOrderedMatMul")),
        *((MICROSOFT, "MatMulNBitsMlp"), (MICROSOFT, "MatMulNBitsQkv")),
        *((MICROSOFT, "EmbedLayerNormalization"), (MICROSOFT, "QEmbedLayerNormalization")),
        *((MICROSOFT, "FusedConv"), (MICROSOFT, "NhwcConv"), (MICROSOFT, "QLinearConv")),
        *((MICROSOFT, "FusedGemm"), (MICROSOFT, "QGemm"), (MICROSOFT, "GemmFloat8")),
        *((MICROSOFT, "GemmFastGelu"), (MICROSOFT, "TransposeMatMul")),
        *((MICROSOFT, "GatherBlockQuantized"), (MICROSOFT, "MatMulBnb4")),
        *((MICROSOFT, "MatMulFpQ4"), (MICROSOFT, "MoE"), (MICROSOFT, "QMoE")),
        ("com.microsoft.nchwc", "Conv"),
        ("com.ms.internal.nhwc", "Conv"),
    }
)


def operator_of(node: ir.Node) -> Operator | None:
    """The row of the table that `node` is of, where it has one."""
    return OPERATORS.get((_domain(node), node.op_type))


def problem_of(node: ir.Node) -> str | None:
    """What `node` has that is not in the table, or is refused there; None where nothing is."""
    operator = operator_of(node)
    if operator is None:
        return f"{node.op_type} is no operator that can be rewritten"
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        if index >= len(operator.inputs):
            return f"{node.op_type} has an input number {index}, which is not known"
        name, treatment = list(operator.inputs.items())[index]
        if treatment is REFUSED:
            return f"{node.op_type} has the input {name}"
    for name, attribute in node.attributes.items():
        if name not in operator.attributes:
            return f"{node.op_type} has the attribute {name}, which is not known"
        given = attribute.value
        if operator.attributes[name] is REFUSED and given != operator.refused.get(name):
            return f"{node.op_type} has {name} = {given}"
    return None


def check_operators(module: str, nodes: Iterable[ir.Node]) -> None:
    """Raise ExportError where one of `nodes`, which compute `module`, has what is not known."""
    for node in nodes:
        problem = problem_of(node)
        if problem is not None:
            raise ExportError(
                f"{module}: {problem}: its numbers cannot be read or changed without it; give the"
                " graph without it"
            )


def unreached(graph: ir.Graph) -> dict[str, int]:
    """How many nodes there are of each operator that has layers' weights and takes no adapters."""
    found: dict[str, int] = {}
    for node in graph:
        if (_domain(node), node.op_type) in UNREACHED:
            found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def unreached_layers(graph: ir.Graph) -> str | None:
    """What to say of them where a module was not found; None where there are none."""
    found = [f"{op} ({count})" for op, count in unreached(graph).items()]
    if not found:
        return None
    return (
        f"layers in {listed_names(found, 2)} take no adapters: give the graph as it was before its"
        " operators were fused or quantized"
    )


def _domain(node: ir.Node) -> str:
    return "" if node.domain == "ai.onnx" else node.domain
