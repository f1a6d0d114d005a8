"""The forms of a tied head that the benchmark compares compute the same."""

from __future__ import annotations

import numpy as np
import pytest

from tools.bench_tied_head import _FORMS, graph_of, opened


@pytest.mark.parametrize("form", _FORMS)
def test_each_form_multiplies_the_embeddings_of_its_tokens_by_the_same_matrix(form: str) -> None:
    matrix = np.random.default_rng(0).standard_normal((7, 4), dtype=np.float32)
    tokens = np.array([[3, 0, 6]])
    (logits,) = opened(graph_of(form, matrix)).run(None, {"tokens": tokens})
    np.testing.assert_allclose(logits, matrix[tokens] @ matrix.T, rtol=1e-5)
