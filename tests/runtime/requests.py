"""Random requests to a decoder, and the numbers that PyTorch computes for each row alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from loradeploy.bundle.names import LEFT, LOGITS_TO_KEEP
from loradeploy.runtime.session import AdapterSession

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class DecoderRequest:
    """A batch of prompts, read in parts and followed by decode steps with given tokens.

    `adapters`, `lengths`: of each row, the name (None: the base) and the tokens of the prompt.
    `cuts`: where a prompt is cut into parts. `steps`: further tokens of each row. `selects`:
    whether the logits of some positions only are requested. `seed`: of tokens and positions.
    """

    adapters: tuple[str | None, ...]
    lengths: tuple[int, ...]
    cuts: tuple[int, ...] = ()
    steps: int = 0
    selects: bool = False
    seed: int = 0


@st.composite
def requests(draw: st.DrawFn, names: tuple[str, ...], longest: int = 24) -> DecoderRequest:
    """Requests of up to five rows with the adapters `names` and the base."""
    rows = draw(st.integers(1, 5))
    name = st.sampled_from((None, *names))
    one = draw(st.booleans())
    length = st.integers(1, longest)
    lengths = [draw(length)] * rows if draw(st.booleans()) else [draw(length) for _ in range(rows)]
    return DecoderRequest(
        adapters=(draw(name),) * rows if one else tuple(draw(name) for _ in range(rows)),
        lengths=tuple(lengths),
        cuts=tuple(draw(st.lists(length, max_size=3))),
        steps=draw(st.integers(0, 4)),
        selects=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 16)),
    )


class RowsInTorch:
    """The logits of single rows, computed in float32 by transformers and PEFT without a cache."""

    def __init__(self, model: Path, adapters: Mapping[str, Path]) -> None:
        import peft
        import torch
        from transformers import AutoModelForCausalLM

        self._models: dict[str | None, Any] = {}
        places: list[tuple[str | None, Path | None]] = [(None, None), *adapters.items()]
        for name, place in places:
            base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            held = base if place is None else peft.PeftModel.from_pretrained(base, place)
            self._models[name] = held.eval()

    def logits(self, adapter: str | None, tokens: Ids) -> NDArray[np.float32]:
        """The logits [tokens, vocabulary] of one row."""
        import torch

        with torch.no_grad():
            found = self._models[adapter](input_ids=torch.from_numpy(tokens)[None]).logits
        result: NDArray[np.float32] = found[0].numpy()
        return result


def answers(
    session: AdapterSession, request: DecoderRequest, tokens: list[Ids]
) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """Yield (row, position in the row, logits) of all runs of `request` on a graph with a cache.

    `tokens`: those of each row, prompt and steps. Rows are padded on the side of the bundle.
    """
    lengths = np.array(request.lengths)
    rows, width = len(lengths), int(lengths.max())
    left = session.manifest.padding == LEFT
    starts = width - lengths if left else np.zeros(rows, np.int64)
    columns = np.arange(width)
    mask = ((columns >= starts[:, None]) & (columns < (starts + lengths)[:, None])).astype(np.int64)
    ids = np.zeros((rows, width), np.int64)
    for row, own in enumerate(tokens):
        ids[row, mask[row] == 1] = own[: lengths[row]]
    # GroupQueryAttention takes several new tokens after a past for a single row only.
    parts = rows == 1 if session.manifest.cache_in_place else left
    cuts = [0, *sorted({cut for cut in request.cuts if parts and cut < width}), width]
    random = np.random.default_rng(request.seed)
    names = {spec.name for spec in session.manifest.inputs}
    merged = session.manifest.mode == "merged"
    with session.hold(None if merged else request.adapters) as held:
        cache = session.empty_cache(rows)

        def run(new: Ids, mask: Ids, kept: Ids | None = None) -> NDArray[Any]:
            cache.make_room(int(mask.shape[1]))
            # A step of rows that are padded on the right follows the tokens of each row.
            step = new.shape[1] == 1 and not left
            positions = (
                mask.sum(axis=1, keepdims=True) - 1
                if step
                else np.maximum(mask.cumsum(axis=1) - 1, 0)[:, mask.shape[1] - new.shape[1] :]
            )
            feeds = {"input_ids": new, "attention_mask": mask, "position_ids": positions}
            own = {name: values for name, values in feeds.items() if name in names}
            selection = {} if kept is None else {LOGITS_TO_KEEP: kept}
            logits, *present = held.run_with_ort_values(
                ["logits", *cache.outputs],
                {**own, **selection, **cache.inputs},
                buffers=cache.buffers,
            )
            cache.keep(present)
            return np.array(logits.numpy())

        for begin, end in itertools.pairwise(cuts):
            kept = np.tile(np.arange(begin, end), (rows, 1))
            selects = request.selects and session.manifest.logits_to_keep
            if selects:
                kept = random.integers(begin, end, (rows, int(random.integers(1, 4))))
            logits = run(ids[:, begin:end], mask[:, :end], kept - begin if selects else None)
            for row, index in np.ndindex(*kept.shape):
                if mask[row, kept[row, index]]:
                    yield row, int(kept[row, index] - starts[row]), logits[row, index]
        for step in range(request.steps):
            total = np.arange(width + step + 1)
            seen = (total >= starts[:, None]) & (total < (starts + lengths + step + 1)[:, None])
            new = np.array(
                [[own[length + step]] for own, length in zip(tokens, lengths, strict=True)]
            )
            logits = run(new, seen.astype(np.int64))
            for row in range(rows):
                yield row, int(lengths[row]) + step, logits[row, 0]


def largest_error(
    session: AdapterSession, request: DecoderRequest, expected: RowsInTorch, vocabulary: int
) -> float:
    """The largest difference of a row's logits from those that PyTorch computes for it alone.

    It is relative to the largest of these logits.
    """
    random = np.random.default_rng(request.seed)
    tokens = [random.integers(3, vocabulary, length + request.steps) for length in request.lengths]
    rows = [expected.logits(name, own) for name, own in zip(request.adapters, tokens, strict=True)]
    errors = [
        np.abs(logits - rows[row][position]).max()
        for row, position, logits in answers(session, request, tokens)
    ]
    return float(max(errors) / max(np.abs(logits).max() for logits in rows))
