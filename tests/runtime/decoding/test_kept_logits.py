"""Logits of selected positions: equal to those of a full run, and no others are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.names import GRAPH_NAME, LOGITS_TO_KEEP, REQUIRED_NAME
from loradeploy.errors import BudgetError, BundleError, UsageError
from loradeploy.export.api import export
from loradeploy.runtime.decoding.caches.memory import row_bytes
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.conftest import MakeAdapter
from tests.runtime.feeds import feeds, random_ids
from tests.tolerances import tolerance

IDS = random_ids(3, 6)
MIXED = ["small", None, "large"]
KEPT = {
    "the last": [[-1]],
    "one of each row": [[5], [0], [3]],
    "two of each row": [[1, -1], [4, 4], [0, 2]],
    "three of all": [[0, 2, -3]],
}


@pytest.fixture(scope="module", params=["left", "right"])
def session(request: pytest.FixtureRequest, llama_adapters: dict[str, Path]) -> AdapterSession:
    """A session on a bundle with left padding, and one on a bundle with a cache in place."""
    names = {"left": "tiny_llama_bundle", "right": "in_place"}
    opened = AdapterSession(request.getfixturevalue(names[request.param]))
    for name, path in llama_adapters.items():
        opened.load(name, path)
    return opened


def run(session: AdapterSession, kept: Any = None, adapters: Any = None) -> Any:
    """Return the logits for IDS, [rows, kept, vocabulary]."""
    own = {} if kept is None else {LOGITS_TO_KEEP: np.array(kept)}
    (found,) = session.run(["logits"], {**feeds(session.manifest, IDS), **own}, adapters)
    return found


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("adapters", [None, "small", MIXED], ids=["base", "one", "mixed"])
def test_selected_positions_have_their_logits(
    session: AdapterSession, kept: list[list[int]], adapters: Any
) -> None:
    whole, found = run(session, adapters=adapters), run(session, kept, adapters)
    for row, positions in enumerate(np.broadcast_to(kept, (len(IDS), len(kept[0])))):
        error = np.abs(found[row] - whole[row, positions]).max()
        assert found.shape[1] == len(positions)
        assert error <= tolerance("rows"), row
        assert np.abs(found[row] - whole[row, positions - 1]).max() > 100 * tolerance("rows")


def test_a_run_without_a_selection_has_the_logits_of_all_positions(session: AdapterSession) -> None:
    run(session, [[-1]])
    assert run(session).shape[1] == IDS.shape[1]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([[6]], "contains 6, there are 6 tokens: give positions of -6 to 5"),
        ([[0], [0], [-7]], "contains -7"),
        ([[0], [0]], "give positions once for all"),
        ([0], r"takes int64 \[rows, kept\]"),
    ],
)
def test_an_invalid_position_is_refused(
    session: AdapterSession, kept: list[Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(session, kept)


def test_a_prefill_computes_the_logits_of_one_position_per_prompt(session: AdapterSession) -> None:
    """Tested by its memory budget: the logits of all 40 positions would exceed it."""
    prompts = [[int(token) for token in row] for row in random_ids(2, 40)]
    row = 512 * 4
    generator = TextGenerator(session)
    cache = 2 * 42 * row_bytes(session.manifest)
    tight = TextGenerator(session, cache_budget=cache + 2 * row)
    assert tight.generate(prompts, max_new_tokens=2) == generator.generate(
        prompts, max_new_tokens=2
    )
    with pytest.raises(BudgetError):
        TextGenerator(session, cache_budget=cache + row).generate(prompts, max_new_tokens=2)


@pytest.fixture(scope="module")
def head(tiny_llama: Path, make_adapter: MakeAdapter) -> Path:
    """An adapter for the output head and for attention."""
    return make_adapter(tiny_llama, r=4, seed=3, target_modules=["q_proj", "lm_head"])


@pytest.fixture(scope="module")
def made(tiny_llama_bundle: Path, head: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int4 bundle with branches, an adapter for the output head, and required.onnx."""
    place = tmp_path_factory.mktemp("kept") / "bundle"
    export(
        tiny_llama_bundle,
        place,
        adapters={"head": head},
        precision="int4",
        branches=True,
        required_inputs=True,
    )
    return place


@pytest.mark.parametrize("adapter", [None, "head"])
def test_a_packed_head_with_adapters_selects_positions_in_every_branch(
    made: Path, adapter: str | None
) -> None:
    session = AdapterSession(made)
    whole, found = run(session, adapters=adapter), run(session, [[2]], adapter)
    np.testing.assert_allclose(found[:, 0], whole[:, 2], atol=tolerance("rows"))
    assert np.abs(run(session, [[2]], "head") - run(session, [[2]])).max() > 0.1


@pytest.mark.parametrize("adapter", [None, "head"])
def test_one_position_can_be_selected_twice(made: Path, adapter: str | None) -> None:
    """More positions than tokens: values of equal declared sizes share memory in onnxruntime."""
    session = AdapterSession(made)
    one = feeds(session.manifest, IDS[:, :1])
    (whole,) = session.run(["logits"], one, adapter)
    (found,) = session.run(["logits"], {**one, LOGITS_TO_KEEP: np.array([[0, -1]])}, adapter)
    np.testing.assert_allclose(found, np.repeat(whole, 2, axis=1), atol=tolerance("rows"))


def test_clients_without_the_input_get_the_logits_of_all_positions(made: Path) -> None:
    own = feeds(read_manifest(made), IDS)
    expected = run(AdapterSession(made))
    defaults, _ = read_arrays(made / "required.safetensors", error=BundleError)
    for name, fed in ((GRAPH_NAME, {}), (REQUIRED_NAME, defaults)):
        plain = onnxruntime.InferenceSession(made / name, providers=["CPUExecutionProvider"])
        (found,) = plain.run(["logits"], {**own, **fed})
        np.testing.assert_allclose(found, expected, atol=tolerance("rows"))


def test_a_bundle_without_the_input_generates_the_same_and_refuses_a_selection(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    manifest = export(tiny_llama_bundle, tmp_path / "bundle", logits_to_keep=False)
    assert not manifest.logits_to_keep
    assert manifest.outputs[0].shape == ("batch", "sequence", 512)
    with AdapterSession(tmp_path / "bundle") as without, AdapterSession(tiny_llama_bundle) as own:
        prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
        texts = [TextGenerator(each).generate(prompts, max_new_tokens=8) for each in (own, without)]
        assert texts[0] == texts[1]
        with pytest.raises(UsageError, match="unknown logits_to_keep"):
            run(without, [[-1]])
