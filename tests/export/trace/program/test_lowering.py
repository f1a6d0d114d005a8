from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnxscript.function_libs.torch_lib import registration

from loradeploy.export.trace.program.lowering import lowered
from loradeploy.lora.quiet import quiet

X = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)


class Plain(torch.nn.Module):
    """Operators of transformers' models besides matrix products; all have an ONNX equivalent."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 6)
        self.register_buffer("mask", torch.tensor([True, False, True, True, False, True]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.nn.functional.dropout(self.layer(x), 0.5, self.training).contiguous()
        positive = (y > 0) & self.get_buffer("mask") | (y < -1)
        y = y + positive.to(torch.float32).to("cpu")
        return y.transpose(1, 2).reshape(y.shape[0], -1), y.detach()


class Unlisted(Plain):
    """A module with an operator that has to be decomposed."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = super().forward(x)
        return torch.ops.aten.addcmul(first, first, first), second


def program_of(module: torch.nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    return torch.export.export(
        module, (torch.from_numpy(X[:2]),), dynamic_shapes=({0: batch},), strict=False
    )


def exported(program: torch.export.ExportedProgram) -> tuple[list[str], list[Any]]:
    """Export the program; return the graph's operators and its outputs for X."""
    made = torch.onnx.export(
        program, dynamo=True, optimize=False, verbose=False, output_names=["flat", "y"]
    )
    assert made is not None
    model = made.model_proto
    session = onnxruntime.InferenceSession(model.SerializeToString())
    name = session.get_inputs()[0].name
    return [node.op_type for node in model.graph.node], session.run(["flat", "y"], {name: X})


@pytest.mark.parametrize("kind", [Plain, Unlisted])
def test_a_lowered_program_computes_what_the_module_computes(kind: type[Plain]) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    program = program_of(module)
    with quiet(), lowered(program):
        spared = program.run_decompositions({}) is program
        operators, values = exported(program)
    assert spared == (kind is Plain), "programs of listed operators alone go without decomposition"
    assert "run_decompositions" not in vars(program)
    assert "Dropout" not in operators
    for ours, theirs in zip(values, module(torch.from_numpy(X)), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-6)


def test_active_dropout_is_left_to_torch() -> None:
    program = program_of(Plain().train())
    before = str(program.graph)
    with lowered(program):
        assert "run_decompositions" not in vars(program)
    assert str(program.graph) == before


def test_patches_are_reverted_after_an_error() -> None:
    program, operators = program_of(Plain().eval()), registration.default_registry
    with pytest.raises(RuntimeError), lowered(program):
        assert registration.default_registry is not operators
        raise RuntimeError
    assert registration.default_registry is operators
    assert "run_decompositions" not in vars(program)
