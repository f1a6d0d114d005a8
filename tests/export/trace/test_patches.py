from __future__ import annotations

import pytest
import torch
from transformers import masking_utils
from transformers.pytorch_utils import Conv1D

from loradeploy.export.trace.patches import traceable


def _mask(attention: torch.Tensor, function: object) -> torch.Tensor:
    total = attention.shape[1]
    mask: torch.Tensor = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        batch_size=len(attention),
        q_length=total,
        kv_length=total,
        mask_function=function,
        attention_mask=attention,
        allow_is_causal_skip=False,
    )
    return mask.expand(len(attention), 1, total, total)


@pytest.mark.parametrize(
    "function",
    [
        masking_utils.causal_mask_function,
        masking_utils.sliding_window_causal_mask_function(3),
    ],
    ids=["causal", "sliding"],
)
def test_no_row_of_a_padded_causal_mask_is_fully_masked(function: object) -> None:
    attention = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    plain = _mask(attention, function)
    with traceable():
        mask = _mask(attention, function)
    assert mask.any(dim=-1).all()
    assert not plain.any(dim=-1).all()
    real = attention.bool()[:, None, :, None].expand_as(mask)
    assert torch.equal(mask[real], plain[real]), "what real tokens see stays as it was"


def test_masks_of_encoders_are_not_changed() -> None:
    attention = torch.tensor([[1, 1, 1, 0]])
    function = masking_utils.bidirectional_mask_function
    plain = _mask(attention, function)
    with traceable():
        assert torch.equal(_mask(attention, function), plain)


def test_conv1d_is_the_same_function_without_flattening() -> None:
    layer, x = Conv1D(5, 3), torch.randn(2, 4, 3)
    plain = layer(x)
    with traceable():
        assert torch.allclose(layer(x), plain, atol=1e-6)


def test_patches_are_reverted() -> None:
    before = Conv1D.forward, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(RuntimeError), traceable():
        raise RuntimeError
    assert before == (Conv1D.forward, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
