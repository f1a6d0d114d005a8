"""Targets of one fused weight share a pair of side inputs, and each keeps its own function."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from loradeploy.adapter import Adapter, AdapterConfig, Factors
from loradeploy.bundle.factors import adapter_from_side_inputs, side_inputs
from loradeploy.bundle.manifest import LoraTarget, Manifest
from loradeploy.bundle.pairs import factor_pairs
from loradeploy.errors import AdapterMismatchError, BundleError
from tests.bundle.test_manifest import a_manifest

IN = 3
SLICES = {"l.q": (0, 4), "l.k": (4, 6), "l.v": (6, 8)}


def fused_targets(**changes: Any) -> tuple[LoraTarget, ...]:
    return tuple(
        LoraTarget(
            **{
                "module": module,
                "in_features": IN,
                "out_features": end - begin,
                "lora_A": "l.q+k+v.lora_A",
                "lora_B": "l.q+k+v.lora_B",
                "weight": "l.q+k+v.weight",
                "transposed": False,
                "found_by": "metadata",
                "slice": (begin, end),
                **(changes if module == "l.k" else {}),
            }
        )
        for module, (begin, end) in SLICES.items()
    )


def a_fused_manifest() -> Manifest:
    return a_manifest(targets=fused_targets(), saved=(), adapters={})


def an_adapter(ranks: dict[str, int]) -> Adapter:
    rng = np.random.default_rng(0)
    factors = {}
    for module, rank in ranks.items():
        begin, end = SLICES[module]
        A, B = rng.standard_normal((rank, IN)), rng.standard_normal((end - begin, rank))
        factors[module] = Factors(A.astype(np.float32), B.astype(np.float32))
    config = AdapterConfig(
        r=2,
        lora_alpha=6,
        target_modules=tuple(module[2:] for module in ranks),
        rank_pattern=ranks,
    )
    return Adapter(config, factors, {})


@pytest.mark.parametrize(
    "ranks",
    [{"l.q": 2, "l.k": 2, "l.v": 2}, {"l.q": 2, "l.v": 1}, {"l.k": 3}],
    ids=["all members", "two of three, of other ranks", "one member"],
)
def test_each_members_ranks_reach_its_own_outputs_only(ranks: dict[str, int]) -> None:
    adapter, manifest = an_adapter(ranks), a_fused_manifest()
    arrays = side_inputs(adapter, manifest)
    assert {name: array.shape for name, array in arrays.items()} == {
        "l.q+k+v.lora_A": (1, IN, sum(ranks.values())),
        "l.q+k+v.lora_B": (1, sum(ranks.values()), 8),
    }
    update = arrays["l.q+k+v.lora_A"][0] @ arrays["l.q+k+v.lora_B"][0]
    expected = np.zeros((IN, 8), np.float32)
    for module, own in adapter.factors.items():
        begin, end = SLICES[module]
        expected[:, begin:end] = adapter.scaling(module) * (own.B @ own.A).T
    np.testing.assert_allclose(update, expected, rtol=1e-5)


@pytest.mark.parametrize("ranks", [{"l.q": 2, "l.k": 2, "l.v": 2}, {"l.q": 2, "l.v": 1}])
def test_the_members_come_back_from_the_side_inputs(ranks: dict[str, int]) -> None:
    adapter, manifest = an_adapter(ranks), a_fused_manifest()
    back = adapter_from_side_inputs(side_inputs(adapter, manifest), manifest)
    assert back.factors.keys() == adapter.factors.keys()
    for module, own in back.factors.items():
        first = adapter.factors[module]
        np.testing.assert_array_equal(own.A, first.A)
        scaled = np.float32(adapter.scaling(module)) * first.B
        np.testing.assert_array_equal(own.B, scaled)


def test_a_rank_that_several_members_use_comes_back_in_each() -> None:
    manifest = a_fused_manifest()
    rng = np.random.default_rng(1)
    A = rng.standard_normal((1, IN, 1)).astype(np.float32)
    B = rng.standard_normal((1, 1, 8)).astype(np.float32)
    arrays = {"l.q+k+v.lora_A": A, "l.q+k+v.lora_B": B}
    back = side_inputs(adapter_from_side_inputs(arrays, manifest), manifest)
    whole = back["l.q+k+v.lora_A"][0] @ back["l.q+k+v.lora_B"][0]
    np.testing.assert_allclose(whole, A[0] @ B[0], rtol=1e-5)


def test_the_sizes_of_a_pair_are_those_of_the_whole_product() -> None:
    (pair,) = factor_pairs(fused_targets())
    assert (pair.label, pair.in_features, pair.out_features) == ("l.q+k+v", IN, 8)
    assert [member.module for member in pair.members] == list(SLICES)


def test_a_native_file_for_other_sizes_is_refused_by_the_pairs_name() -> None:
    A, B = np.ones((1, IN, 2), np.float32), np.ones((1, 2, 4), np.float32)
    with pytest.raises(AdapterMismatchError, match=r"l.q\+k\+v.lora_B is .*\[1, 2, 4\]"):
        adapter_from_side_inputs({"l.q+k+v.lora_A": A, "l.q+k+v.lora_B": B}, a_fused_manifest())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slice": (3, 5)}, "the slice of l.k is not one of its size, or another's too"),
        ({"slice": (4, 5)}, "the slice of l.k is not one of its size"),
        ({"slice": None}, "share the name"),
        ({"weight": "other"}, "l.q and l.k are not parts of one weight"),
        ({"in_features": 5}, "l.q and l.k are not parts of one weight"),
        ({"lora_B": "l.other"}, "share the name"),
    ],
)
def test_a_manifest_whose_members_cannot_share_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    manifest = a_manifest(targets=fused_targets(**changes), saved=(), adapters={})
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
