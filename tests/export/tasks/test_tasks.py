"""Exports of other tasks: encoder-decoders, images, audio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import ExportError
from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from tests.export.reference import difference
from tests.tolerances import tolerance

Arrays = dict[str, NDArray[Any]]

_RANDOM: Final = np.random.default_rng(5)
_IDS: Final = _RANDOM.integers(5, 110, (3, 9))
_TEXT: Final[Arrays] = {"input_ids": _IDS, "attention_mask": np.ones_like(_IDS)}
_TARGET: Final[Arrays] = {"decoder_input_ids": _IDS[:, :6]}
_TOKENS: Final = {"vocab_size": 120, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER_DECODER: Final = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 3,
    "forced_eos_token_id": 2,
    **_TOKENS,
}
_ENCODER: Final = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@dataclass(frozen=True)
class Kind:
    """A tiny model: its task, classes of transformers, inputs, and PEFT's task type."""

    task: str
    auto: str
    config: str
    values: Mapping[str, Any]
    feeds: Arrays
    peft: str | None = None
    heads: tuple[str, ...] = ()


KINDS: Final = {
    "t5": Kind(
        "seq2seq-lm",
        "AutoModelForSeq2SeqLM",
        "T5Config",
        {
            "vocab_size": 120,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
        {**_TEXT, **_TARGET},
        "SEQ_2_SEQ_LM",
    ),
    "bart": Kind(
        "seq2seq-lm",
        "AutoModelForSeq2SeqLM",
        "BartConfig",
        {**_ENCODER_DECODER, "max_position_embeddings": 64},
        {**_TEXT, **_TARGET},
        "SEQ_2_SEQ_LM",
    ),
    "whisper": Kind(
        "seq2seq-lm",
        "AutoModelForSpeechSeq2Seq",
        "WhisperConfig",
        {
            **_ENCODER_DECODER,
            "max_source_positions": 20,
            "max_target_positions": 30,
            "num_mel_bins": 8,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
        {"input_features": _RANDOM.standard_normal((3, 8, 40)).astype(np.float32), **_TARGET},
    ),
    "vit": Kind(
        "image-classification",
        "AutoModelForImageClassification",
        "ViTConfig",
        {**_ENCODER, "image_size": 16, "patch_size": 4, "num_labels": 5},
        {"pixel_values": _RANDOM.standard_normal((3, 3, 16, 16)).astype(np.float32)},
        heads=("classifier",),
    ),
}
pytestmark = pytest.mark.slow


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def prepared(kind: Kind, place: Path) -> tuple[Path, dict[str, Path], dict[str | None, Arrays]]:
    """Return the model, two PEFT adapters, and PyTorch's outputs with each and without."""
    import peft
    import torch
    import transformers

    config = getattr(transformers, kind.config)(**kind.values)
    config.initializer_range = 0.15
    auto = getattr(transformers, kind.auto)
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(place / "model")
    feeds = {name: torch.from_numpy(values) for name, values in kind.feeds.items()}

    def logits(model: Any) -> NDArray[Any]:
        with torch.no_grad():
            answer: NDArray[Any] = model.eval()(**feeds).logits.numpy()
        return answer

    answers: dict[str | None, Any] = {None: logits(auto.from_pretrained(place / "model"))}
    adapters = {}
    for seed, name in enumerate(("first", "second")):
        settings = peft.LoraConfig(
            r=2 + 2 * seed,
            lora_alpha=8,
            target_modules="all-linear",
            modules_to_save=list(kind.heads) or None,
            task_type=kind.peft,
        )
        model = peft.get_peft_model(auto.from_pretrained(place / "model"), settings)
        generator = torch.Generator().manual_seed(seed)
        for key, values in model.named_parameters():
            if values.requires_grad:
                size = 0.1 if "lora_" in key else 0.2
                values.data = torch.randn(values.shape, generator=generator) * size
        adapters[name] = place / name
        model.save_pretrained(adapters[name], save_embedding_layers=False)
        answers[name] = logits(model)
    return place / "model", adapters, answers


@pytest.mark.breadth
def test_every_kind_computes_what_pytorch_computes(kind: Kind, tmp_path: Path) -> None:
    model, adapters, answers = prepared(kind, tmp_path)
    allowed = tolerance("torch-onnx-tiny")
    manifest = export(model, tmp_path / "side", adapters=adapters)
    assert manifest.task == kind.task
    session = AdapterSession(tmp_path / "side")
    for name in (None, "first", "second"):
        assert difference(session.run(["logits"], kind.feeds, name)[0], answers[name]) <= allowed
        assert name is None or difference(answers[name], answers[None]) > 0.1
    rows = ["second", None, "first"]
    mixed = session.run(["logits"], kind.feeds, rows)[0]
    for row, name in enumerate(rows):
        assert difference(mixed[row], answers[name][row]) <= allowed

    export(
        tmp_path / "side", tmp_path / "merged", adapters={"first": adapters["first"]}, merge=True
    )
    merged = AdapterSession(tmp_path / "merged")
    assert difference(merged.run(["logits"], kind.feeds)[0], answers["first"]) <= allowed
    assert read_manifest(tmp_path / "merged").task == kind.task


def test_the_target_does_not_attend_to_padding_of_the_source(tmp_path: Path) -> None:
    import torch
    import transformers

    kind = KINDS["bart"]
    model, adapters, _ = prepared(kind, tmp_path)
    export(model, tmp_path / "side", adapters=adapters)
    mask = kind.feeds["attention_mask"].copy()
    mask[1, 5:] = 0
    feeds = {**kind.feeds, "attention_mask": mask}
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    with torch.no_grad():
        expected = reference(**{n: torch.from_numpy(v) for n, v in feeds.items()}).logits.numpy()
    got = AdapterSession(tmp_path / "side").run(["logits"], feeds)[0]
    assert difference(got, expected) <= tolerance("torch-onnx-tiny")


def test_unsupported_models_are_refused_in_one_line(tmp_path: Path) -> None:
    kind = KINDS["bart"]
    model, _, _ = prepared(kind, tmp_path)
    with pytest.raises(ExportError, match="encoder-decoder model, which is exported for seq2seq"):
        export(model, tmp_path / "out", task="sequence-classification")
