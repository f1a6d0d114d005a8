"""Qwen-VL's vision tower and merger for images of one grid, in a form that can be traced.

transformers computes positions, and which patches attend to each other, from the values of
`image_grid_thw`. Here the grid is the shape of the pixel values, [images, rows, columns, merged,
values]: in the order of processors, the patches of one place (`merged`, 2 x 2) are consecutive.

    Qwen2-VL      all patches of an image attend to each other
    Qwen2.5-VL    in most layers only those of one window do; windows at the edges are padded, and
                  the padding is masked

Qwen2.5-VL: https://arxiv.org/abs/2502.13923, section 2.1.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def patch_sizes(visual: Any) -> tuple[int, int]:
    """The number of patches that are merged into one token, and of values of a patch."""
    embed = visual.patch_embed
    values = embed.in_channels * embed.temporal_patch_size * embed.patch_size**2
    return visual.spatial_merge_size**2, int(values)


def image_features(inner: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Compute the embeddings of image tokens, [images, rows * columns, hidden].

    `inner`: a Qwen-VL model without its head. `pixels` [images, rows, columns, merged, values].
    While tracing, the functions below are used, otherwise transformers' code.
    """
    import torch

    if torch.compiler.is_exporting():
        return _features(inner.visual, pixels)
    images, rows, columns = pixels.shape[:3]
    side = inner.visual.spatial_merge_size
    grid = torch.tensor([[1, rows * side, columns * side]] * images)
    found = inner.visual(pixels.flatten(0, 3), grid_thw=grid).pooler_output
    result: torch.Tensor = found.view(images, rows * columns, -1)
    return result


@dataclass(frozen=True, eq=False)
class _Windows:
    """The windows of patches that attend to each other, as indices of the places of a grid.

    `places` [windows * window]: the places of each window; padding has any place. `real` [windows,
    window]: False for padding. `back` [places]: the index of each place in `places`. `merged`: the
    number of patches in a place.
    """

    places: torch.Tensor
    real: torch.Tensor
    back: torch.Tensor
    merged: int


def _features(visual: Any, pixels: torch.Tensor) -> torch.Tensor:
    images, rows, columns, merged, values = pixels.shape
    x = visual.patch_embed(pixels.reshape(-1, values))
    x = x.reshape(images, rows * columns * merged, x.shape[-1])  # [images, patches, size]
    tables = visual.rotary_pos_emb(x, _positions(rows, columns, visual.spatial_merge_size))
    side = _window_side(visual)
    windows = None if side is None else _windows(rows, columns, side, visual.spatial_merge_size**2)
    everywhere = getattr(visual, "fullatt_block_indexes", ())
    for number, block in enumerate(visual.blocks):
        within = None if number in everywhere else windows
        x = x + _attended(block.attn, block.norm1(x), tables, within)
        x = x + block.mlp(block.norm2(x))
    x = visual.merger.ln_q(x).reshape(images, rows * columns, merged * x.shape[-1])
    result: torch.Tensor = visual.merger.mlp(x)
    return result


def _positions(rows: int, columns: int, side: int) -> torch.Tensor:
    """The row and the column of each patch, [patches, 2], in the order of processors."""
    import torch

    shape = (rows, columns, side, side)
    inside = torch.arange(side)
    row = torch.arange(rows)[:, None, None, None] * side + inside[:, None]
    column = torch.arange(columns)[:, None, None] * side + inside
    both = [row.expand(shape).reshape(-1), column.expand(shape).reshape(-1)]
    return torch.stack(both, dim=-1)


def _window_side(visual: Any) -> int | None:
    """The number of places on a side of a window; None if all patches attend to each other."""
    size = getattr(visual, "window_size", None)
    return None if size is None else int(size // visual.spatial_merge_size // visual.patch_size)


def _windows(rows: int, columns: int, side: int, merged: int) -> _Windows:
    import torch

    down, across = (rows + side - 1) // side, (columns + side - 1) // side
    row, column = torch.arange(down * side), torch.arange(across * side)
    real = (row < rows)[:, None] & (column < columns)  # [down * side, across * side]
    places = torch.where(real, row[:, None] * columns + column, 0)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    window = row // side * across + column // side  # [rows, columns]
    back = window * side**2 + row % side * side + column % side

    def apart(values: torch.Tensor) -> torch.Tensor:
        """Reshape [down * side, across * side] to [windows, side²]."""
        split = values.reshape(down, side, across, side).transpose(1, 2)
        return split.reshape(down * across, side**2)

    return _Windows(apart(places).reshape(-1), apart(real), back.reshape(-1), merged)


def _attended(
    attention: Any,
    x: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    windows: _Windows | None,
) -> torch.Tensor:
    """The attention of x [images, patches, size], between all patches or within `windows`."""
    import torch
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    images, patches, size = x.shape
    heads = attention.num_heads
    parts = attention.qkv(x).reshape(images, patches, 3, heads, size // heads)
    q, k, v = parts.unbind(2)  # [images, patches, heads, head size]
    q, k = apply_rotary_pos_emb_vision(q, k, *tables)
    mask = None
    if windows is not None:
        q, k, v = (_into(part, windows) for part in (q, k, v))
        mask = _mask(windows, images)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=attention.scaling
    ).transpose(1, 2)
    if windows is not None:
        y = _out_of(y, windows, images, patches)
    result: torch.Tensor = attention.proj(y.reshape(images, patches, size))
    return result


def _into(part: torch.Tensor, windows: _Windows) -> torch.Tensor:
    """Split [images, patches, heads, head size] into [images * windows, patches of a window, …]."""
    images, _, heads, size = part.shape
    count, places = windows.real.shape
    found = part.reshape(images, -1, windows.merged, heads, size)
    found = found.index_select(1, windows.places)
    return found.reshape(images * count, places * windows.merged, heads, size)


def _out_of(y: torch.Tensor, windows: _Windows, images: int, patches: int) -> torch.Tensor:
    """The inverse of `_into`, without the padding of windows."""
    _, _, heads, size = y.shape
    count, places = windows.real.shape
    found = y.reshape(images, count * places, windows.merged, heads, size)
    return found.index_select(1, windows.back).reshape(images, patches, heads, size)


def _mask(windows: _Windows, images: int) -> torch.Tensor:
    """The attention mask within windows, bool [images * windows, 1, inside, inside]."""
    count, places = windows.real.shape
    inside = places * windows.merged
    seen = windows.real[None, :, None, None, :, None]
    seen = seen.expand(images, count, 1, inside, places, windows.merged)
    return seen.reshape(images * count, 1, inside, inside)
