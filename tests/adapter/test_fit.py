"""The check that an adapter fits a base, for every kind of base."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from loradeploy.adapter import Adapter, AdapterConfig, Factors
from loradeploy.adapter.adapter import Rows
from loradeploy.adapter.fitting.fit import AdaptableBase, Layer, check_fit
from loradeploy.errors import AdapterMismatchError

BASE = AdaptableBase(
    "this base model",
    layers={
        "l.q": Layer("linear", (3,), 4),
        "embed": Layer("embedding", (9,), 3),
        "patch": Layer("conv2d", (4, 2, 2), 6, groups=2),
        "small": Layer("linear", (3,), 4, refusal=lambda rank, whole: f"takes no rank {rank}"),
    },
    parameters={"norm.weight": (3,)},
    weights={"embed.weight": (9, 3)},
)
BESIDE = dataclasses.replace(
    BASE,
    name="this bundle",
    layers={"l.q": Layer("linear", (3,), 4, scaled=False)},
    side_inputs=True,
    own_weights=("embed.weight",),
)
RANK = 2


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def linear(into: int = 3, out: int = 4, *, dora: bool = False) -> Factors:
    return Factors(zeros(RANK, into), zeros(out, RANK), zeros(out) if dora else None)


def adapter(module: str = "l.q", pair: Factors | None = None, **given: object) -> Adapter:
    pair = linear() if pair is None else pair
    config = AdapterConfig(r=RANK, target_modules=(module,), use_dora=pair.magnitude is not None)
    return Adapter(config, {module: pair}, **given)  # type: ignore[arg-type]


def convolution(groups: int) -> Factors:
    return Factors(zeros(RANK, 4, 2, 2), zeros(6, RANK // groups, 1, 1), kind="conv2d")


@pytest.mark.parametrize(
    "fits",
    [
        adapter(),
        adapter("patch", convolution(2)),
        adapter("embed", Factors(zeros(RANK, 9), zeros(3, RANK), kind="embedding")),
        adapter(saved={"norm.weight": zeros(3)}, carried={"embed.weight": zeros(9, 3)}),
    ],
    ids=["linear", "convolution", "embedding", "parameters"],
)
def test_a_fitting_adapter_is_accepted(fits: Adapter) -> None:
    check_fit(fits, BASE)


@pytest.mark.parametrize(
    ("base", "other", "message"),
    [
        (BASE, adapter("l.x"), "l.x is not a linear layer of this base model"),
        (
            BASE,
            adapter("embed"),
            "embed is not a linear layer of this base model, but an embedding",
        ),
        (BASE, adapter(pair=linear(into=5)), r"l.q.lora_A is \[2, 5\], the base takes 3"),
        (BASE, adapter(pair=linear(out=5)), r"l.q.lora_B is \[5, 2\], the base gives 4"),
        (BASE, adapter("patch", convolution(1)), "patch is a convolution of 2 groups.* for 1"),
        (BASE, adapter("small"), "small takes no rank 2"),
        (BASE, adapter(saved={"a.bias": zeros(3)}), "a.bias .a trained bias. is not a parameter"),
        (BASE, adapter(saved={"norm.weight": zeros(4)}), r"norm.weight is \[4\], .* has \[3\]"),
        (BASE, adapter(carried={"embed.weight": zeros(11, 3)}), "vocabulary has 11 tokens, .* 9"),
        (BASE, adapter(rows={"embed.weight": Rows((9,), zeros(1, 3))}), "tokens up to 9"),
        (BESIDE, adapter("l.x"), "l.x is not a target module of this bundle"),
        (
            dataclasses.replace(BESIDE, own_weights=("head.weight",), remedy_for_others="do that"),
            adapter("head"),
            "head has no side inputs for its factors: do that",
        ),
        (
            dataclasses.replace(BESIDE, remedy_for_others="do that"),
            dataclasses.replace(
                adapter(saved={"lm_head.weight": zeros(9, 3)}),
                config=AdapterConfig(r=2, target_modules=("l.q",), modules_to_save=("lm_head",)),
            ),
            "lm_head.weight .modules_to_save. is not a side input of this bundle: do that",
        ),
        (BESIDE, adapter("patch", convolution(2)), "a convolution, which cannot have side inputs"),
        (BESIDE, adapter(pair=linear(dora=True)), "l.q has no scale in this bundle"),
        (BESIDE, adapter(carried={"embed.weight": zeros(9, 3)}), "differs from the base's"),
        (
            BESIDE,
            adapter(rows={"embed.weight": Rows((1,), zeros(1, 3))}),
            "not known whether another weight .* is tied to it: export the ONNX model with `check",
        ),
        (BESIDE, adapter(rows={"other.weight": Rows((1,), zeros(1, 3))}), "merge it instead"),
        (
            BESIDE,
            dataclasses.replace(
                adapter(),
                config=AdapterConfig(r=2, target_modules=("l.q",), modules_to_save=("embed",)),
            ),
            "embed.weight is in modules_to_save and has no tensors",
        ),
        (
            dataclasses.replace(BASE, digest="sha256:aa"),
            adapter(base_digest="sha256:bb"),
            "digest bb, this base model's is aa",
        ),
        (dataclasses.replace(BASE, lacking=["score.weight"]), adapter(), "in neither the base nor"),
        (
            BASE,
            dataclasses.replace(
                adapter(), config=AdapterConfig(r=2, target_modules=("l.q", "small"))
            ),
            "small is targeted and has no",
        ),
    ],
)
def test_a_mismatch_names_the_base_that_was_compared(
    base: AdaptableBase, other: Adapter, message: str
) -> None:
    with pytest.raises(AdapterMismatchError, match=message) as refusal:
        check_fit(other, base)
    assert str(refusal.value).startswith(f"the adapter does not fit {base.name}: ")


def test_an_adapter_of_another_model_is_refused_in_one_sentence() -> None:
    config = AdapterConfig(r=RANK, target_modules=("x", "y"), base_model_name_or_path="other/model")
    both = Adapter(config, {"x": linear(), "y": linear()})
    with pytest.raises(
        AdapterMismatchError, match=r"x is not .*, nor are the other 1: .* other/mod"
    ):
        check_fit(both, BASE)


@pytest.mark.parametrize(
    ("trained_on", "base", "digests", "warned"),
    [
        ("org/Llama-1B", "org/Llama-1B-Instruct", False, True),
        ("org/Llama-1B", "ORG/llama-1b", False, False),
        ("org/Llama-2B", "mirror/Llama-2B", False, False),  # a mirror
        ("org/Llama-3B", "org/Llama-3B-Instruct", True, False),  # compared by digest
        ("/models/Llama", "org/Llama-1B-Instruct", False, False),
        ("org/Llama-1B", "base", False, False),  # a directory
        (None, "org/Llama-1B", False, False),
    ],
)
def test_a_base_of_another_name_is_a_warning_once(
    trained_on: str | None,
    base: str,
    digests: bool,
    warned: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    known = "sha256:11" if digests else None
    made = adapter(base_digest=known)
    config = dataclasses.replace(made.config, base_model_name_or_path=trained_on)
    for _ in range(2):
        check_fit(
            dataclasses.replace(made, config=config),
            dataclasses.replace(BASE, model=base, digest="sha256:11"),
        )
    assert len(caplog.records) == warned
    if warned:
        assert f"trained on {trained_on}, this base is {base}" in caplog.text
