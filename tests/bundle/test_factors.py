"""An adapter is converted to side inputs, or refused with every mismatch named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.adapter import Adapter, AdapterConfig, Factors
from loradeploy.bundle.adapter_inputs.factors import check_side_inputs, computable, side_inputs
from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter, write_onnx_adapter
from loradeploy.errors import AdapterError, AdapterMismatchError
from tests.bundle.manifests import a_manifest

CONFIG = AdapterConfig(r=2, lora_alpha=6, target_modules=("q", "k"), modules_to_save=("head",))


def factors(*, rank: int = 2, into: int = 3, out: int = 4) -> Factors:
    rng = np.random.default_rng(0)
    A = rng.standard_normal((rank, into)).astype(np.float32)
    return Factors(A, rng.standard_normal((out, rank)).astype(np.float32))


def an_adapter(**changes: Any) -> Adapter:
    values: dict[str, Any] = {
        "config": CONFIG,
        "factors": {"l.q": factors(), "l.k": factors()},
        "saved": {"head.weight": np.arange(20, dtype=np.float32).reshape(5, 4)},
    }
    return Adapter(**{**values, **changes})


def test_factors_are_transposed_and_the_scaling_is_folded_into_B() -> None:
    adapter = an_adapter()
    arrays = side_inputs(adapter, a_manifest())
    pair = adapter.factors["l.q"]
    assert {n: a.shape for n, a in arrays.items()} == {
        "l.q.lora_A": (1, 3, 2),
        "l.q.lora_B": (1, 2, 4),
        "l.k.lora_A": (1, 3, 2),
        "l.k.lora_B": (1, 2, 4),
        "head.weight": (1, 4, 5),
    }
    update = arrays["l.q.lora_A"][0] @ arrays["l.q.lora_B"][0]
    np.testing.assert_allclose(update, 3.0 * (pair.B @ pair.A).T, rtol=1e-6)
    np.testing.assert_array_equal(arrays["head.weight"][0], adapter.saved["head.weight"].T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"factors": {"l.q": factors(into=9), "l.k": factors()}},
            r"lora_A is \[2, 9\].*takes 3",
        ),
        (
            {"factors": {"l.q": factors(out=9), "l.k": factors()}},
            r"lora_B is \[9, 2\].*gives 4",
        ),
        (
            {"factors": {"l.x": factors(), "l.q": factors(), "l.k": factors()}},
            "l.x is not a target",
        ),
        ({"factors": {"l.q": factors()}}, "l.k is targeted and has no tensors"),
        (
            {"saved": {"head.bias": np.zeros(5, np.float32)}},
            "head.bias .* merge it instead",
        ),
        (
            {"saved": {"head.weight": np.zeros((4, 5), np.float32)}},
            r"head.weight is \[4, 5\]",
        ),
        ({"base_digest": "sha256:77"}, "trained on another base"),
    ],
)
def test_a_mismatch_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterMismatchError, match=message):
        side_inputs(an_adapter(**changes), a_manifest())


def test_a_head_that_the_base_lacks_is_required_of_every_adapter(tmp_path: Path) -> None:
    (head,) = a_manifest().saved
    lacking = a_manifest(saved=(dataclasses.replace(head, lacking=True),))
    plain = dataclasses.replace(CONFIG, modules_to_save=())
    whole, headless = an_adapter(), an_adapter(saved={}, config=plain)
    side_inputs(headless, a_manifest())  # accepted if the base has a head
    side_inputs(whole, lacking)
    with pytest.raises(AdapterMismatchError, match=r"head\.weight is in neither the base nor"):
        side_inputs(headless, lacking)
    write_onnx_adapter(headless, a_manifest(), tmp_path / "a.onnx_adapter")
    with pytest.raises(AdapterMismatchError, match=r"head\.weight is missing"):
        check_side_inputs(read_onnx_adapter(tmp_path / "a.onnx_adapter"), lacking)


def test_one_message_lists_every_mismatch() -> None:
    wrong = an_adapter(factors={"l.x": factors(), "l.q": factors(into=9)})
    with pytest.raises(AdapterMismatchError) as refusal:
        side_inputs(wrong, a_manifest())
    for misfit in ("l.x is not a target", "takes 3", "l.k is targeted"):
        assert misfit in str(refusal.value)


def test_a_merged_bundle_refuses_adapters() -> None:
    merged = a_manifest(mode="merged", targets=(), saved=(), adapters={})
    with pytest.raises(AdapterMismatchError, match="is merged"):
        side_inputs(an_adapter(), merged)


@pytest.mark.parametrize(("dtype", "most"), [("float16", 65504), ("float32", 1e18)])
def test_values_up_to_a_maximum_are_accepted(dtype: str, most: float) -> None:
    fits = np.array([most, -most, 0], dtype)
    assert computable(fits)
    assert computable(fits[:0])
    for odd in (np.inf, np.nan, *([2e18] if dtype == "float32" else [])):
        assert not computable(np.append(fits, np.array(odd, dtype)))


def test_factors_that_overflow_their_dtype_are_refused() -> None:
    big = Factors(np.full((2, 3), 1e5, np.float32), np.full((4, 2), 1e5, np.float32))
    adapter = an_adapter(factors={"l.q": big, "l.k": factors()})
    side_inputs(adapter, a_manifest())
    with pytest.raises(AdapterMismatchError, match=r"l.q.lora_A does not fit into float16"):
        side_inputs(adapter, a_manifest(factor_dtype="float16"))


@pytest.mark.parametrize("size", [1e-8, 1e-5, 1.0, 1e6])
@pytest.mark.parametrize("small", ["A", "B"])
def test_factors_are_rescaled_to_fit_float16(size: float, small: str) -> None:
    pair = factors()
    sized = dataclasses.replace(pair, **{small: getattr(pair, small) * np.float32(size)})
    adapter = an_adapter(factors={"l.q": sized, "l.k": pair})
    arrays = side_inputs(adapter, a_manifest(factor_dtype="float16"))
    one, other = (arrays[f"l.q.lora_{half}"][0] for half in "AB")
    assert one.dtype == other.dtype == np.float16
    exact = 3.0 * (sized.B.astype(np.float64) @ sized.A.astype(np.float64)).T
    got = one.astype(np.float64) @ other.astype(np.float64)
    assert np.abs(got - exact).max() <= 2e-3 * np.abs(exact).max()
    plain = side_inputs(adapter, a_manifest())
    np.testing.assert_array_equal(plain["l.q.lora_A"][0], sized.A.T)


@pytest.mark.parametrize("tops", [(1.0, 1e4), (1e4, 1.0), (100.0, 100.0), (3e4, 1e-2)])
def test_the_product_with_A_fits_into_float16_where_that_with_both_factors_does(
    tops: tuple[float, float],
) -> None:
    """x A of many features, and of some that are large, as language models have."""
    shapes = ((2, 3), (4, 2))
    A, B = (np.full(shape, top, np.float32) for shape, top in zip(shapes, tops, strict=True))
    adapter = an_adapter(factors={"l.q": Factors(A, B), "l.k": factors()})
    arrays = side_inputs(adapter, a_manifest(factor_dtype="float16"))
    one, other = (arrays[f"l.q.lora_{half}"][0].astype(np.float64) for half in "AB")
    assert np.abs(one).max() <= 2
    assert one @ other == pytest.approx(3.0 * (B.astype(np.float64) @ A).T, rel=2e-3)


def test_a_native_file_contains_the_side_inputs(tmp_path: Path) -> None:
    manifest, adapter = a_manifest(), an_adapter()
    write_onnx_adapter(adapter, manifest, tmp_path / "a.onnx_adapter")
    expected, read = (
        side_inputs(adapter, manifest),
        read_onnx_adapter(tmp_path / "a.onnx_adapter"),
    )
    assert read.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(read[name], values)


def test_the_same_adapter_gives_the_same_native_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_onnx_adapter(an_adapter(), a_manifest(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, None])
def test_a_broken_native_file_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "a.onnx_adapter"
    write_onnx_adapter(an_adapter(), a_manifest(), file)
    file.write_bytes(file.read_bytes()[:-40] if content is None else content)
    with pytest.raises(AdapterError, match="truncated or not an .onnx_adapter"):
        read_onnx_adapter(file)
    with pytest.raises(AdapterError, match="does not exist"):
        read_onnx_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            Factors(np.zeros((2, 3, 1, 1), np.float32), np.zeros((4, 2, 1, 1)), kind="conv2d"),
            "l.q is a convolution, which cannot have side inputs: merge it instead",
        ),
        (
            Factors(np.zeros((2, 3), np.float32), np.zeros((4, 2)), kind="embedding"),
            "l.q is an embedding without side inputs .*side_inputs=.*embedding.*, or merge it",
        ),
    ],
)
def test_factors_without_side_inputs_are_refused_by_name(pair: Factors, message: str) -> None:
    adapter = an_adapter(factors={"l.q": pair, "l.k": factors()})
    with pytest.raises(AdapterMismatchError, match=message):
        side_inputs(adapter, a_manifest())


def test_dora_without_a_scale_and_biases_without_an_offset_are_refused_by_name() -> None:
    config = dataclasses.replace(CONFIG, use_dora=True, bias="all")
    ones = np.ones(4, np.float32)
    pairs = {name: dataclasses.replace(factors(), magnitude=ones) for name in ("l.q", "l.k")}
    adapter = an_adapter(config=config, factors=pairs, saved={"l.q.bias": ones})
    with pytest.raises(AdapterMismatchError) as refusal:
        side_inputs(adapter, a_manifest())
    for message in ("DoRA", "l.k and 1 more have no scale", "l.q.bias (a trained bias)"):
        assert message in str(refusal.value)
