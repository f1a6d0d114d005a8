"""Combining adapters and reducing their rank: sums of updates, and the reported error."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.adapter import Adapter, AdapterConfig, Factors, save_adapter
from loradeploy.adapter.adapter import Rows
from loradeploy.adapter.algebra.delta import as_matrix, update
from loradeploy.adapter.algebra.dora import output_scale
from loradeploy.errors import AdapterError, UsageError

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
    "l.q": ((12,), (10,), "linear"),
    "emb": ((30,), (8,), "embedding"),
    "conv": ((3, 3, 3), (6,), "conv2d"),
}


def an_adapter(seed: int = 0, rank: int = 4, alpha: float = 8, **changes: Any) -> Adapter:
    rng = np.random.default_rng(seed)
    config = {"use_dora": False, **changes.pop("config", {})}
    factors = {}
    for module, (into, (out,), kind) in SHAPES.items():
        B = (out, rank, 1, 1) if kind == "conv2d" else (out, rank)
        factors[module] = Factors(
            A=rng.normal(size=(rank, *into)).astype(np.float32),
            B=rng.normal(size=B).astype(np.float32),
            magnitude=np.ones(out, np.float32) if config["use_dora"] else None,
            kind=kind,
        )
    return Adapter(
        AdapterConfig(r=rank, lora_alpha=alpha, target_modules=tuple(SHAPES), **config),
        changes.pop("factors", factors),
        **changes,
    )


def updates(adapter: Adapter) -> dict[str, Any]:
    return {m: update(pair, adapter.scaling(m)) for m, pair in adapter.factors.items()}


def weighted(*terms: tuple[Adapter, float]) -> dict[str, Any]:
    return {
        module: sum(weight * updates(adapter)[module] for adapter, weight in terms)
        for module in SHAPES
    }


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("weight", [0.5, 1.0, -0.7])
def test_a_combination_is_the_weighted_sum_of_the_updates(method: str, weight: float) -> None:
    one = an_adapter(1, rank=2, alpha=3)
    other = an_adapter(2, rank=4, config={"use_rslora": True})
    rank = 6 if method == "svd" else None
    combined = ld.combine({one: 2.0, other: weight}, method=method, rank=rank)

    expected = weighted((one, 2.0), (other, weight))
    for module, values in updates(combined).items():
        np.testing.assert_allclose(values, expected[module], atol=2e-5)
        assert not np.allclose(values, weighted((one, 2.0))[module], atol=0.1)
    assert {pair.rank for pair in combined.factors.values()} == {6}


def test_an_adapter_minus_itself_is_zero() -> None:
    one = an_adapter(1)
    same = Adapter(one.config, one.factors)
    for method in ("cat", "svd"):
        for values in updates(ld.combine({one: 1, same: -1}, method=method)).values():
            assert np.abs(values).max() <= 1e-4
    assert max(np.abs(v).max() for v in updates(one).values()) > 1


def test_svd_keeps_the_highest_rank_and_is_the_best_approximation() -> None:
    one, other = an_adapter(1, rank=2), an_adapter(2, rank=4)
    combined = ld.combine({one: 1, other: 1}, method="svd")
    exact = weighted((one, 1), (other, 1))
    for module, pair in combined.factors.items():
        assert pair.rank == 4
        matrix = as_matrix(exact[module], pair)
        U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        ours = as_matrix(update(pair, combined.scaling(module)), pair)
        np.testing.assert_allclose(ours, best, atol=1e-4)


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_biases_of_factors_are_added(method: str) -> None:
    one, other = (
        dataclasses.replace(each, factors={m: p for m, p in each.factors.items() if m != "emb"})
        for each in (an_adapter(1), an_adapter(2))
    )
    biases = {m: np.arange(len(p.B), dtype=np.float32) for m, p in one.factors.items()}
    biased = dataclasses.replace(
        one,
        config=dataclasses.replace(one.config, lora_bias=True),
        factors={m: dataclasses.replace(p, bias=biases[m]) for m, p in one.factors.items()},
    )
    combined = ld.combine({biased: 0.5, other: 2}, method=method)
    assert combined.config.lora_bias
    for module, pair in combined.factors.items():
        total = combined.scaling(module) * pair.bias
        np.testing.assert_allclose(total, 0.5 * one.scaling(module) * biases[module], rtol=1e-6)


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_a_combination_equals_that_of_peft(method: str, tiny_gpt2: Path, make_adapter: Any) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    places = [make_adapter(tiny_gpt2, r=4, alpha=alpha, seed=alpha) for alpha in (6, 9)]
    base = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    model = peft.PeftModel.from_pretrained(base, places[0], adapter_name="0")
    model.load_adapter(places[1], adapter_name="1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["0", "1"], [0.7, -0.4], "both", combination_type=method)

    ours = ld.combine({places[0]: 0.7, str(places[1]): -0.4}, method=method)
    assert ours.factors
    for module, pair in ours.factors.items():
        layer = model.base_model.model.get_submodule(module)
        theirs = layer.get_delta_weight("both").detach().numpy().T
        np.testing.assert_allclose(update(pair, ours.scaling(module)), theirs, atol=1e-5)
        assert np.abs(theirs).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"use_dora": True}}, "is a DoRA adapter, whose magnitudes cannot be added"),
        ({"config": {"init_lora_weights": "pissa"}}, "loradeploy convert ADAPTER --model BASE"),
        ({"base_digest": "sha256:11"}, "different bases"),
        ({"rank": 2}, "method linear needs equal ones, use cat or svd"),
        ({"factors": {"l.q": Factors(np.ones((4, 9)), np.ones((10, 4)))}}, "have different shapes"),
        (
            {"saved": {"h.weight": np.ones(3)}, "config": {"modules_to_save": ("h",)}},
            "have both fully trained h.weight",
        ),
    ],
)
def test_adapters_that_cannot_be_combined_are_refused(change: dict[str, Any], message: str) -> None:
    head = {"saved": {"h.weight": np.zeros(3)}, "config": {"modules_to_save": ("h",)}}
    one = an_adapter(1, base_digest="sha256:00", **head)
    with pytest.raises(AdapterError, match=message):
        ld.combine({one: 1, an_adapter(2, **change): 1}, method="linear")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: ld.combine({}), "no adapters"),
        (lambda a: ld.combine({a: 1}, method="mean"), "'mean' is unknown"),
        (lambda a: ld.combine({a: 1}, method="cat", rank=2), "`rank` needs method svd"),
        (lambda a: ld.combine({a: math.nan}), "has the weight nan"),
        (lambda a: ld.reduce_rank(a), "either `rank` or `energy`"),
        (lambda a: ld.reduce_rank(a, 2, energy=0.5), "either `rank` or `energy`"),
        (lambda a: ld.reduce_rank(a, 0), "1 or more"),
        (lambda a: ld.reduce_rank(a, energy=1.5), "a fraction above 0"),
    ],
)
def test_invalid_options_are_refused(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(an_adapter())


def test_fully_trained_parameters_come_from_the_adapter_that_has_them() -> None:
    head = np.ones((2, 3), np.float32)
    one = an_adapter(1, saved={"h.weight": head}, config={"modules_to_save": ("h",)}, labels=("a",))
    combined = ld.combine({one: 1, an_adapter(2): -0.5})
    assert combined.saved["h.weight"] is head
    assert (combined.config.modules_to_save, combined.labels) == (("h",), ("a",))
    with pytest.raises(AdapterError, match=r"h\.weight, which cannot be subtracted"):
        ld.combine({one: -1, an_adapter(2): 1})


def bringing(seed: int = 1, size: float = 1.0, tokens: float = 2.0) -> Adapter:
    """Return an adapter with a changed base weight under its factors, and two trained rows."""
    return an_adapter(
        seed,
        carried={"emb.weight": np.full((30, 8), size, np.float32)},
        rows={"head.weight": Rows((3, 7), np.full((2, 8), tokens, np.float32))},
        config={"extra": {"trainable_token_indices": {"head": [3, 7]}}},
    )


@pytest.mark.parametrize(
    "changed",
    [
        lambda a: ld.reduce_rank(a, 2)[0],
        lambda a: ld.combine({a: 1}),
        lambda a: ld.combine({a: 1}, method="svd", rank=2),
        lambda a: ld.combine({a: 1, bringing(2): 0.5}),
    ],
    ids=["reduced", "cat of one", "svd of one", "cat of two with the same"],
)
def test_changed_base_weights_and_trained_rows_are_kept(changed: Any, tmp_path: Path) -> None:
    before = bringing()
    save_adapter(changed(before), tmp_path)
    after = ld.load_adapter(tmp_path)
    assert after.carried.keys() == before.carried.keys()
    np.testing.assert_array_equal(after.carried["emb.weight"], before.carried["emb.weight"])
    assert after.rows["head.weight"].indices == (3, 7)
    np.testing.assert_array_equal(
        after.rows["head.weight"].values, before.rows["head.weight"].values
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({bringing(): 1, an_adapter(2): 1}, r"emb\.weight of the base is in"),
        ({an_adapter(2): 1, bringing(): 1}, r"emb\.weight of the base is in"),
        ({bringing(): 1, bringing(2, size=1.5): 1}, r"emb\.weight of the base is in"),
        ({bringing(): 1, bringing(2, tokens=3): 1}, r"both trained rows of head\.weight"),
        ({bringing(): -1}, r"rows of head\.weight .* cannot be subtracted"),
    ],
    ids=["one lacks it", "the first lacks it", "another base", "other rows", "negative"],
)
def test_weights_and_rows_that_cannot_be_combined_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        ld.combine(weights)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_the_error_of_a_reduction_is_reported(rank: int, config: dict[str, Any]) -> None:
    adapter = an_adapter(config=config)
    reduced, report = ld.reduce_rank(adapter, rank)
    gone = all_of_it = 0.0
    for module, pair in reduced.factors.items():
        before, after = updates(adapter)[module], updates(reduced)[module]
        error = np.linalg.norm(before - after) / np.linalg.norm(before)
        assert pair.rank == report.ranks[module] == min(rank, 4)
        assert report.errors[module] == pytest.approx(error, abs=1e-6)
        assert reduced.scaling(module) == pytest.approx(adapter.scaling(module), rel=1e-12)
        gone += np.linalg.norm(before - after) ** 2
        all_of_it += np.linalg.norm(before) ** 2
    assert report.total == pytest.approx(math.sqrt(gone / all_of_it), abs=1e-6)
    assert report.worst == max(report.errors.values())
    assert (report.worst == 0) == (rank >= 4)


def test_an_energy_threshold_keeps_as_many_singular_values_as_needed() -> None:
    adapter = an_adapter()
    reduced, report = ld.reduce_rank(adapter, energy=0.8)
    for module, pair in reduced.factors.items():
        assert report.errors[module] ** 2 <= 0.2
        fewer = ld.reduce_rank(adapter, pair.rank - 1)[1] if pair.rank > 1 else None
        assert fewer is None or fewer.errors[module] ** 2 > 0.2
    assert len(set(report.ranks.values())) > 1, "the modules need other ranks"
    assert ld.reduce_rank(adapter, energy=1.0)[1].worst <= 1e-6


def test_a_combination_with_patterns_can_be_saved_and_loaded(tmp_path: Path) -> None:
    one = an_adapter(1)
    less = Adapter(
        AdapterConfig(r=2, target_modules=("l.q",)), {"l.q": an_adapter(2, 2).factors["l.q"]}
    )
    combined = ld.combine({one: 1, less: 1})
    assert {m: p.rank for m, p in combined.factors.items()} == {"l.q": 6, "emb": 4, "conv": 4}
    digest = save_adapter(combined, tmp_path)
    assert ld.load_adapter(tmp_path).digest == digest


@pytest.mark.parametrize("module", list(SHAPES))
def test_the_scale_of_dora_is_magnitude_over_norm(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = an_adapter(config={"use_dora": True}).factors[module]
    rng = np.random.default_rng(3)
    W = rng.normal(size=update(pair, 1.0).shape).astype(np.float32)
    merged = as_matrix(W + update(pair, 0.5), pair)
    expected = pair.magnitude / np.linalg.norm(merged, axis=1)
    monkeypatch.setattr("loradeploy.adapter.algebra.dora._BLOCK", 40)  # several row blocks
    np.testing.assert_allclose(output_scale(as_matrix(W, pair), pair, 0.5), expected, rtol=1e-5)
    with pytest.raises(AdapterError, match="no magnitude"):
        output_scale(as_matrix(W, pair), an_adapter().factors[module], 0.5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["a", "b"], "`weights` is"),
        ({1: 1.0}, "`weights` names 1"),
        ({"a": None}, "a has the weight None"),
        ({"a": "1"}, "a has the weight '1'"),
        ({"a": 10**400}, "a has the weight 1000"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_weights_are_numbers_by_adapter(weights: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ld.combine(weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter": "a", "rank": 1}, "give an Adapter"),
        ({"adapter": None, "rank": "1"}, "`rank` is '1'"),
        ({"adapter": None, "rank": 1.0}, "`rank` is 1.0"),
        ({"adapter": None, "rank": True}, "`rank` is True"),
        ({"adapter": None, "energy": "1"}, "`energy` is '1'"),
    ],
    ids=str,
)
def test_arguments_of_a_reduction_have_their_types(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ld.reduce_rank(**arguments)
