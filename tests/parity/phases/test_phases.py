"""The phases of a check: how rows are batched and fed, with a model simple enough to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loradeploy.parity.names import (
    CHUNKED,
    DECODE,
    ENCODER,
    ONE_ROW,
    PADDED_BATCH,
    PERMUTED,
    PREFILL,
    REPEAT,
)
from loradeploy.parity.phases.batches import MAX_ROWS
from loradeploy.parity.phases.choice import left_out, phases_of, rows_of, spread
from loradeploy.parity.phases.outputs import real_positions
from loradeploy.parity.phases.rows import Row
from loradeploy.parity.phases.run import Feeding, generate, run_phases
from loradeploy.runtime.text.padding import positions_of

WIDTH = 5
PAD = 9


class Counter:
    """A model whose output per new token is [token, sum of unpadded tokens so far, 0, 0, 0]."""

    def __init__(self) -> None:
        self.adapters: list[list[str | None]] = []

    def forward(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], cache: Any, adapters: Sequence[Any]
    ) -> tuple[NDArray[Any], Any]:
        self.adapters.append(list(adapters))
        seen = ids if cache is None else np.concatenate([cache, ids], axis=1)
        values = np.zeros((*ids.shape, WIDTH))
        values[..., 0] = ids
        values[..., 1] = (seen * mask).cumsum(axis=1)[:, -ids.shape[1] :]
        return values, seen


def row(prompt: tuple[int, ...], forced: tuple[int, ...] = (), adapter: str | None = None) -> Row:
    tokens = prompt + forced[:-1]
    values = np.zeros((len(tokens), WIDTH), np.float32)
    values[:, 0], values[:, 1] = tokens, np.cumsum(tokens)
    return Row(0, adapter, prompt, forced, values)


@pytest.mark.parametrize("task", ["causal-lm", "feature-extraction"])
def test_every_phase_returns_the_values_of_its_positions(task: str) -> None:
    forced = (4, 1, 2) if task == "causal-lm" else ()
    rows = [row((3, 1), forced), row((2, 2, 2, 2), forced), row((7,), forced)]
    seen = list(run_phases(Counter(), rows, phases_of(task), Feeding(task, PAD)))
    for observation in seen:
        first = observation.first
        expected = observation.row.expected[first : first + len(observation.values)]
        np.testing.assert_array_equal(observation.values, expected, observation.phase)


def test_a_decoder_runs_with_single_rows_padded_batches_and_decode_steps() -> None:
    rows = [row((3, 1), (4, 1, 2)), row((2,), (4, 1, 2))]
    seen = list(run_phases(Counter(), rows, phases_of("causal-lm"), Feeding("causal-lm", PAD)))
    positions = [(s.phase, s.first, len(s.values)) for s in seen if s.row is rows[0]]
    assert positions == [
        (PREFILL, 0, 4),
        (REPEAT, 0, 4),
        (CHUNKED, 0, 2),
        (CHUNKED, 2, 2),
        (PADDED_BATCH, 0, 2),
        (DECODE, 2, 1),
        (DECODE, 3, 1),
        (PERMUTED, 0, 2),
    ]


def test_an_encoder_returns_the_states_of_each_source_without_padding() -> None:
    class Encoder(Counter):
        def encode(self, ids: Any, mask: Any, adapters: Any) -> Any:
            self.adapters.append(list(adapters))
            return np.where(mask == 1, ids, -1)[..., np.newaxis]

    def source(prompt: tuple[int, ...], adapter: str | None) -> Row:
        encoded = np.array(prompt, np.float32)[:, np.newaxis]
        return dataclasses.replace(row(prompt, adapter=adapter), encoded=encoded)

    model = Encoder()
    rows = [source((1, 2, 3), None), source((4,), "a"), row((5, 6))]
    seen = list(run_phases(model, rows, [ENCODER], Feeding("seq2seq-lm", PAD)))
    assert [observation.row for observation in seen] == rows[:2]
    assert model.adapters == [[None, "a"]]
    for observation in seen:
        np.testing.assert_array_equal(observation.values, observation.expected)
        assert len(observation.values) == observation.row.due(ENCODER)


def test_an_output_per_row_is_one_additional_position() -> None:
    class Pooling(Counter):
        def forward(self, ids: Any, mask: Any, cache: Any, adapters: Any) -> Any:
            values, cache = super().forward(ids, mask, cache, adapters)
            return np.concatenate([values, np.full((len(ids), 1, WIDTH), 100.0)], axis=1), cache

    rows = [row((3, 1)), row((2, 2, 2))]
    phases = (ONE_ROW, PADDED_BATCH)
    for seen in run_phases(Pooling(), rows, phases, Feeding("feature-extraction", PAD)):
        assert len(seen.values) == len(seen.row.prompt) + 1
        assert (seen.values[-1] == 100.0).all()


def test_every_row_runs_with_its_own_adapter() -> None:
    model = Counter()
    rows = [row((1, 2), adapter=None), row((3,), adapter="a"), row((4,), adapter="b")]
    list(run_phases(model, rows, [PADDED_BATCH], Feeding("feature-extraction", PAD)))
    assert model.adapters == [[None, "a", "b"]]


def test_splitting_rows_into_batches_leaves_no_batch_of_one() -> None:
    model = Counter()
    list(run_phases(model, [row((1,))] * 17, [PADDED_BATCH], Feeding("feature-extraction", 0)))
    assert [len(adapters) for adapters in model.adapters] == [17]


def test_chunked_prefill_feeds_several_new_tokens_to_a_nonempty_cache() -> None:
    class Chunks(Counter):
        shapes: list[tuple[int, int]]

        def forward(self, ids: Any, mask: Any, cache: Any, adapters: Any) -> Any:
            self.shapes = [*getattr(self, "shapes", []), (ids.shape[1], mask.shape[1])]
            return super().forward(ids, mask, cache, adapters)

    model = Chunks()
    list(run_phases(model, [row((1, 2, 3, 4, 5, 6, 7))], [CHUNKED], Feeding("causal-lm", PAD)))
    assert model.shapes == [(3, 3), (2, 5), (2, 7)]


def test_no_row_of_a_permuted_batch_keeps_its_place() -> None:
    model = Counter()
    rows = [row((number,), adapter=str(number)) for number in range(6)]
    seen = list(run_phases(model, rows, [PERMUTED], Feeding("feature-extraction", PAD)))
    assert model.adapters == [["1", "2", "3", "4", "5", "0"]]
    assert [observation.row.adapter for observation in seen] == ["1", "2", "3", "4", "5", "0"]


@pytest.mark.parametrize("count", [2, 4, 5, 9, 16, 17, 33])
def test_every_adapter_of_a_mixed_batch_is_permuted_in_batches_of_limited_size(count: int) -> None:
    model = Counter()
    rows = [row((number,), adapter=str(number % count)) for number in range(2 * count)]
    seen = list(run_phases(model, rows, [PERMUTED], Feeding("feature-extraction", PAD)))
    assert {observation.row.adapter for observation in seen} == {str(n) for n in range(count)}
    assert len(seen) == max(4, count)
    assert all(2 <= len(adapters) <= MAX_ROWS for adapters in model.adapters)
    assert not left_out(PERMUTED, rows)


def test_a_few_rows_of_a_single_adapter_are_permuted() -> None:
    assert len(rows_of(PERMUTED, [row((1,), adapter="it")] * 9)) == 4


def test_an_adapter_without_a_row_in_a_phase_is_named() -> None:
    rows = [row((1, 2, 3, 4), adapter=name) for name in ("a", "b")] + [row((1,), adapter="c")]
    assert left_out(CHUNKED, rows) == ["c"]
    assert left_out(PADDED_BATCH, rows) == []
    assert left_out(CHUNKED, rows[2:]) == []  # a phase without any adapter is no gap of one adapter


def test_a_repeated_row_is_compared_with_its_first_run() -> None:
    class Drifting(Counter):
        runs = 0

        def forward(self, ids: Any, mask: Any, cache: Any, adapters: Any) -> Any:
            values, cache = super().forward(ids, mask, cache, adapters)
            self.runs += 1
            return values + self.runs, cache

    (seen,) = run_phases(Drifting(), [row((3, 1))], [REPEAT], Feeding("causal-lm", PAD))
    assert (seen.values - seen.expected == 1).all()


@pytest.mark.parametrize(
    ("hidden", "passes"), [(-1e18, True), (-np.inf, True), (0.0, False), (np.nan, False)]
)
def test_a_logit_beyond_the_adapters_vocabulary_must_be_hidden(hidden: float, passes: bool) -> None:
    class Wider(Counter):
        def forward(self, ids: Any, mask: Any, cache: Any, adapters: Any) -> Any:
            values, cache = super().forward(ids, mask, cache, adapters)
            values[..., -1] = -1e18
            values[0, -1, -1] = hidden
            return values, cache

    rows = [dataclasses.replace(row((3, 1)), outputs=WIDTH - 1)]
    (seen,) = run_phases(Wider(), rows, [ONE_ROW], Feeding("feature-extraction", PAD))
    assert seen.values.shape[-1] == WIDTH - 1
    assert np.isfinite(seen.values).all() == passes


@pytest.mark.parametrize("mask", ["0011", "1100", "1111", "1011", "0110", "0000"])
@pytest.mark.parametrize("whole_row", [0, 1])
def test_the_unmasked_positions_and_the_per_row_outputs_are_compared(
    mask: str, whole_row: int
) -> None:
    real = np.array([digit == "1" for digit in mask])
    values = np.arange((len(real) + whole_row) * 3.0).reshape(-1, 3)
    expected = [*values[: len(real)][real], *values[len(real) :]]
    assert (
        real_positions(values, real, "causal-lm").tolist() == np.reshape(expected, (-1, 3)).tolist()
    )


def test_an_output_with_fewer_positions_than_tokens_is_an_error() -> None:
    with pytest.raises(IndexError):
        real_positions(np.zeros((3, 2)), np.array([False, True, True, True]), "causal-lm")


def test_rows_of_extreme_lengths_share_no_batch_with_others() -> None:
    model = Counter()
    edges = [dataclasses.replace(row((1,) * length), edge=True) for length in (1, 50)]
    rows = [row((1, 2)), row((3,)), *edges]
    list(run_phases(model, rows, [PADDED_BATCH], Feeding("feature-extraction", PAD)))
    assert [len(adapters) for adapters in model.adapters] == [2, 2]


def test_a_model_of_batch_size_one_decodes_a_few_rows_separately() -> None:
    model = Counter()
    rows = [row((1, 2), (3, 4))] * 6
    seen = list(run_phases(model, rows, [DECODE], Feeding("causal-lm", PAD, batched=False)))
    assert len(seen) == len(rows_of(DECODE, rows, batched=False)) == 4
    assert {len(adapters) for adapters in model.adapters} == {1}


def test_the_generated_token_of_each_step_is_the_likeliest() -> None:
    class Successor(Counter):
        def forward(self, ids: Any, mask: Any, cache: Any, adapters: Any) -> Any:
            return np.eye(WIDTH)[(ids + 1) % WIDTH], ids

    found = generate(Successor(), [(0, 1), (3,)], count=3, pad=PAD, adapter=None)
    assert found == [(2, 3, 4), (4, 0, 1)]


def test_left_padding_takes_no_positions() -> None:
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert positions_of(mask, 2).tolist() == [[0, 1], [2, 3]]


def test_rows_of_all_lengths_are_chosen_including_the_longest() -> None:
    rows = [row((1,) * length, (2,)) for length in (3, 9, 1, 30, 5, 7, 2)]
    assert [len(one.prompt) for one in spread(rows, 3)] == [1, 5, 30]
    assert [len(one.prompt) for one in spread(rows, 2)] == [1, 30]
    assert sorted(map(id, spread(rows, 20))) == sorted(map(id, rows))
