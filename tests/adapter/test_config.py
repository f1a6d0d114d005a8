"""`adapter_config.json`: which fields are supported, kept, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from loradeploy.adapter import AdapterConfig, match_targets, scaling
from loradeploy.adapter.modules.targets import untargeted
from loradeploy.errors import AdapterError


def test_a_config_survives_the_round_trip_through_pefts_own_class() -> None:
    peft = pytest.importorskip("peft")
    written = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"v_proj": 6},
        exclude_modules=["layers.0.q_proj"],
        use_rslora=False,
        lora_dropout=0.1,
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    ).to_dict()
    plain = json.loads(json.dumps(written, default=lambda value: sorted(value)))

    ours = AdapterConfig.from_peft(plain)
    back = json.loads(json.dumps(ours.to_peft()))

    assert {k: v for k, v in back.items() if v} == {k: v for k, v in plain.items() if v}
    assert peft.LoraConfig(**back).rank_pattern == {"v_proj": 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_bias", "all"),
        ("bias", "some"),
        ("alora_invocation_tokens", [1, 2]),
        ("alora_invocation_string", "<think>"),
        ("layer_replication", [[0, 2]]),
        ("enable_lora", [True, False, True]),
        ("target_parameters", "experts.gate_up_proj"),
        ("target_parameters", ["experts.gate_up_proj", 1]),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "pissa_niter_0"),
        ("arrow_config", {"top_k": 2}),
        ("peft_type", "IA3"),
        ("a_field_of_tomorrow", 0.5),
        ("method_version", 2),
    ],
)
def test_an_unsupported_field_that_affects_results_is_refused_by_name(
    field: str, value: object
) -> None:
    with pytest.raises(AdapterError, match=field):
        AdapterConfig.from_peft({"r": 4, "target_modules": ["q"], field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unsloth_version", "2025.3.19"),
        ("swift_version", "3.1.0"),
        ("lorap_emb_lr", 1e-6),
        ("merge_weights", True),
    ],
)
def test_fields_about_the_training_are_kept(field: str, value: object) -> None:
    config = AdapterConfig.from_peft({"r": 4, "target_modules": ["q"], field: value})
    assert config.to_peft()[field] == value


@pytest.mark.parametrize("value", [None, False, {}, []])
def test_an_unknown_field_that_is_off_is_kept(value: object) -> None:
    config = AdapterConfig.from_peft({"r": 4, "target_modules": ["q"], "tomorrow": value})
    assert config.to_peft()["tomorrow"] == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 2.5),
        ("r", "8"),
        ("r", True),
        ("r", None),
        ("lora_alpha", None),
        ("lora_alpha", math.nan),
        ("lora_alpha", "16"),
        ("target_modules", [1]),
        ("target_modules", "(unclosed"),
        ("target_modules", "a" * 5000),
        ("rank_pattern", {"q": 0}),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"q": math.inf}),
        ("alpha_pattern", {"(": 1}),
        ("use_rslora", "yes"),
        ("layers_to_transform", ["0"]),
        ("lora_dropout", 5),
        ("lora_dropout", -0.1),
    ],
)
def test_a_value_of_the_wrong_type_is_named(field: str, value: object) -> None:
    with pytest.raises(AdapterError, match=field):
        AdapterConfig.from_peft({"target_modules": ["q"], field: value})


@pytest.mark.parametrize(
    ("changes", "module", "expected"),
    [
        ({}, "layers.0.q_proj", 2.0),
        ({"use_rslora": True}, "layers.0.q_proj", 8.0),
        ({"alpha_pattern": {"q_proj": 8}}, "layers.0.q_proj", 0.5),
        ({"rank_pattern": {"q_proj": 4}}, "layers.0.q_proj", 8.0),
        ({"rank_pattern": {"q_proj": 4}}, "layers.0.k_proj", 2.0),
        ({"rank_pattern": {"q_proj": 4}}, "layers.0.other_q_proj", 2.0),
        ({"rank_pattern": {r"layers\.0\..*": 8, "q_proj": 4}}, "layers.0.q_proj", 4.0),
        (
            {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 2}},
            "q_proj",
            0.5,
        ),
    ],
)
def test_scaling_is_alpha_over_rank_by_pattern(
    changes: dict[str, object], module: str, expected: float
) -> None:
    config = AdapterConfig.from_peft(
        {"r": 16, "lora_alpha": 32, "target_modules": ["q"], **changes}
    )
    assert scaling(config, module) == expected


NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "lm_head",
]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj"]}, [0, 2, 3]),
        ({"target_modules": ["lm_head"]}, [4]),
        ({"target_modules": ["proj"]}, []),
        ({"target_modules": r".*\.1\..*"}, [2]),
        ({"target_modules": "all-linear"}, [0, 1, 2, 3]),
        (
            {
                "target_modules": ["q_proj"],
                "exclude_modules": ["layers.0.self_attn.q_proj"],
            },
            [2, 3],
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.10\..*"}, [0, 2]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, [2]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 10]}, [0, 3]),
        (
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": [0],
                "layers_pattern": "layers",
            },
            [0],
        ),
        # PEFT checks the layer only of names that match an ending.
        ({"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]}, [0, 4]),
        ({"target_modules": ["q_proj", NAMES[2]], "layers_to_transform": [0]}, [0, 2]),
        (
            {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
            [0, 2, 3],
        ),
    ],
)
def test_target_modules_are_matched_as_peft_does(
    fields: dict[str, object], expected: list[int]
) -> None:
    config = AdapterConfig.from_peft(fields)
    found = match_targets(NAMES, config, linear_names=NAMES[:4])
    assert found == [NAMES[i] for i in expected]
    assert untargeted(found, config) == [], "factors that PEFT uses are refused"

    peft = pytest.importorskip("peft")
    if fields["target_modules"] != "all-linear":
        from peft.tuners.tuners_utils import check_target_module_exists

        theirs = peft.LoraConfig(**fields)
        assert found == [n for n in NAMES if check_target_module_exists(theirs, n)]


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdapterConfig(target_modules=("q",)).r = 3  # type: ignore[misc]
