"""Mutations of valid content: bytes, JSON, safetensors, ONNX graphs.

Each takes a random.Random as its only source of randomness: the same seed gives the same content.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

# Odd values that replace valid ones.
_ODD: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, 0.5, -1.5, 1e39, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "a", "\0", "\ud800", "é", "\x1b[31m", "../x", "/etc/passwd", "a" * 5000, "NaN", "q_proj"),
    *("(", "(?i)x", "(a+)+$", "a{99999999999}", "[", "*", "float32", "int64", "batch"),
    *([], {}, [[]], [1, "a", None], {"a": 1}, [0, 2**62], ["a", "a"], [-1], {"": ""}),
)
_BYTES: Final = (b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x80", b"{", b"[" * 200, b'"', b"\x7f" * 8)


def in_bytes(random: Random, content: bytes) -> bytes:
    """Return `content` with some bytes changed, removed, inserted, or repeated."""
    made = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 5, 20))):
        at = random.randrange(len(made) + 1)
        what = random.randrange(6)
        if what == 0 and made:
            made[min(at, len(made) - 1)] = random.randrange(256)
        elif what == 1 and made:
            made[min(at, len(made) - 1)] ^= 1 << random.randrange(8)
        elif what == 2:
            made[at:at] = random.choice(_BYTES)
        elif what == 3:
            del made[at : at + random.choice((1, 4, 8, 100))]
        elif what == 4 and random.randrange(4) == 0:
            del made[at:]
        else:
            made[at:at] = made[at : at + random.choice((1, 8, 64))]
    return bytes(made)


def in_json(random: Random, content: bytes) -> bytes:
    """Return the JSON in `content` with odd values, and names removed, added, or repeated."""
    if random.randrange(8) == 0:
        return in_bytes(random, content)
    value = json.loads(content)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        value = in_value(random, value)
    text = json.dumps(value)
    if random.randrange(25) == 0 and text.startswith("{"):  # a repeated name
        text = '{"peft_type": 1, "format": 2, "a": 1, "a": 2, ' + text[1:]
    if random.randrange(50) == 0:
        text = text[:-1] + "[" * 100_000
    return text.encode("utf-8", "surrogatepass")


def in_value(random: Random, value: Any) -> Any:
    """Return a JSON value with one mutation, at any depth."""
    places = list(_places(value))
    if not places or random.randrange(30) == 0:
        return random.choice(_ODD)
    holder, key = random.choice(places)
    what = random.randrange(6)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[str(random.choice(_ODD))[:200]] = holder[key]
    elif what == 2:
        holder[key] = [holder[key]]
    elif what == 3:
        other, there = random.choice(places)
        if isinstance(other, dict) and there in other:
            holder[key] = json.loads(json.dumps(other[there]))
    else:
        holder[key] = random.choice(_ODD)
    return value


def _places(value: Any) -> Any:
    """Yield every list or object in `value` with each of its indices or names."""
    keys: Sequence[Any] = ()
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(min(len(value), 50))
    for key in keys:
        yield value, key
        yield from _places(value[key])


def in_safetensors(random: Random, content: bytes) -> bytes:
    """Return a safetensors file with a wrong header, or with values that are not finite."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    what = random.randrange(6)
    if what == 0:
        return in_bytes(random, content)
    if what == 1:
        lie = random.choice((0, 1, 2**31, 2**62, 2**64 - 1, length + 1, length - 1))
        return struct.pack("<Q", lie) + content[8:]
    if what == 2:
        odd = random.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, b""))
        at = random.randrange(0, len(data) // 4 + 1) * 4
        return content[: 8 + length] + data[:at] + odd + data[at + 4 :]
    header = in_json(random, header)
    return struct.pack("<Q", len(header)) + header + data


def in_onnx(random: Random, content: bytes) -> bytes:
    """Return an ONNX file with an invalid graph: dangling values, cycles, wrong shapes, types."""
    import onnx

    if random.randrange(4) == 0:
        return in_bytes(random, content)
    model = onnx.load_from_string(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        random.choice(_IN_GRAPHS)(random, model)
    return bytes(model.SerializeToString())


def _names(model: Any) -> list[str]:
    graph = model.graph
    found = [value.name for value in (*graph.input, *graph.output, *graph.initializer)]
    return [*found, *(name for node in graph.node for name in node.output), "", "nowhere"]


def _node(random: Random, model: Any) -> Any:
    return random.choice(model.graph.node) if model.graph.node else model.graph.node.add()


def _rename_input(random: Random, model: Any) -> None:
    node = _node(random, model)
    if node.input:
        node.input[random.randrange(len(node.input))] = random.choice(_names(model))


def _rename_output(random: Random, model: Any) -> None:
    node = _node(random, model)
    if node.output:
        node.output[random.randrange(len(node.output))] = random.choice(_names(model))


def _other_arity(random: Random, model: Any) -> None:
    node = _node(random, model)
    values: Any = node.input if random.randrange(2) else node.output
    if values and random.randrange(2):
        values.pop()
    else:
        values.append(random.choice(_names(model)))


def _other_operator(random: Random, model: Any) -> None:
    node, other = _node(random, model), _node(random, model)
    names = ("If", "Loop", "Gemm", "MatMulInteger", "Constant", "Identity", "", "Nowhere")
    node.op_type = random.choice((*names, other.op_type))
    node.domain = random.choice(("", "", "com.microsoft", "nowhere"))


def _other_attribute(random: Random, model: Any) -> None:
    import onnx

    node = _node(random, model)
    values: tuple[Any, ...] = (0, -1, 2**40, 1.5, "a", [0, 1], [1.0], ["a"])
    name = random.choice(("axis", "axes", "perm", "transB", "to", "value", "alpha", "bits", "N"))
    if node.attribute and random.randrange(2):
        attribute = random.choice(node.attribute)
        name = attribute.name
        node.attribute.remove(attribute)
    node.attribute.append(onnx.helper.make_attribute(name, random.choice(values)))


def _other_tensor(random: Random, model: Any) -> None:
    if not model.graph.initializer:
        return
    tensor = random.choice(model.graph.initializer)
    what = random.randrange(5)
    if what == 0:
        tensor.dims[:] = [
            random.choice((0, 1, -1, 3, 2**31, 2**62)) for _ in range(random.randrange(4))
        ]
    elif what == 1:
        tensor.data_type = random.choice((0, 1, 2, 6, 7, 8, 9, 10, 11, 16, 23, 99))
    elif what == 2:
        tensor.raw_data = tensor.raw_data[: random.randrange(len(tensor.raw_data) + 1)]
    elif what == 3:
        tensor.name = random.choice(_names(model))
    else:
        tensor.data_location = 1
        del tensor.external_data[:]
        for key, value in (
            ("location", random.choice(("w\0", "../w", "/etc/passwd", "", "w.bin", "a" * 5000))),
            ("offset", random.choice(("0", "-4", "9" * 30, "x"))),
            ("length", random.choice(("0", "-4", "9" * 30, "x", "256"))),
        ):
            if random.randrange(4):
                tensor.external_data.add(key=key, value=value)


def _other_shape(random: Random, model: Any) -> None:
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    if not values:
        return
    kind = random.choice(values).type.tensor_type
    what = random.randrange(4)
    if what == 0:
        kind.elem_type = random.choice((0, 1, 6, 7, 8, 9, 10, 16, 99))
    elif what == 1:
        kind.ClearField("shape")
    elif what == 2:
        kind.shape.dim.add(dim_value=random.choice((0, -1, 5, 2**62)))
    elif kind.shape.dim:
        size = random.choice(kind.shape.dim)
        size.dim_value = random.choice((0, -1, 3, 2**62))


def _less(random: Random, model: Any) -> None:
    graph = model.graph
    parts = (graph.node, graph.input, graph.output, graph.initializer, model.opset_import)
    part = random.choice(parts)
    if part:
        del part[random.randrange(len(part))]


def _twice(random: Random, model: Any) -> None:
    graph = model.graph
    part = random.choice((graph.node, graph.input, graph.output, graph.initializer))
    if part:
        part.add().CopyFrom(random.choice(part))


def _other_order(random: Random, model: Any) -> None:
    nodes = [*model.graph.node]
    random.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _other_version(random: Random, model: Any) -> None:
    for opset in model.opset_import:
        opset.version = random.choice((0, -1, 1, 7, 13, 99, 2**40))
    if random.randrange(2):
        model.ir_version = random.choice((0, 3, 99, 2**40))


def _call_functions(random: Random, model: Any) -> None:
    """Add functions that call each other: recursively, or exponentially many."""
    import onnx

    last = random.choice((1, 3, 30, 300))
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("f", 1)]
    for number in range(last):
        inner = f"F{random.choice((number - 1, number - 1, 0, last - 1))}"
        name, domain = (inner, "f") if number else ("Neg", "")
        nodes = [
            onnx.helper.make_node(name, [a], [b], domain=domain)
            for a, b in (("x", "t"), ("t", "y"))
        ]
        function = onnx.helper.make_function("f", f"F{number}", ["x"], ["y"], nodes, opsets)
        model.functions.append(function)
    node = _node(random, model)
    node.op_type, node.domain = f"F{last - 1}", "f"
    model.opset_import.append(opsets[1])


_IN_GRAPHS: Final[tuple[Callable[[Random, Any], None], ...]] = (
    *(_rename_input, _rename_output, _other_arity, _other_operator, _other_attribute),
    *(_other_tensor, _other_tensor, _other_shape, _less, _twice, _other_order, _other_version),
    _call_functions,
)
