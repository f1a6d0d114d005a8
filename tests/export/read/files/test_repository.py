"""Directories with several graphs: which one is exported, and where config and tokenizer are."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from loradeploy.errors import LoraDeployError, ModelError, UsageError
from loradeploy.export.api import export
from loradeploy.export.read.files.repository import find_graph, find_parts
from loradeploy.export.read.files.source import resolve
from loradeploy.lora.base.checkpoint import find_checkpoint
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.embedding import TextEmbedder
from tests.conftest import MakeAdapter, once
from tests.export.others import export_as_optimum
from tests.tolerances import tolerance

WEB = ("model.onnx", "model_fp16.onnx", "model_q4.onnx", "model_q4f16.onnx", "model_quantized.onnx")
PARTS = ("decoder_model.onnx", "decoder_with_past_model.onnx")


def _with(place: Path, names: tuple[str, ...], folder: str = "onnx") -> Path:
    (place / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        (place / folder / name).touch()
    return place


@pytest.mark.parametrize("folder", ["onnx", ""])
@pytest.mark.parametrize(
    ("names", "precision", "chosen"),
    [
        (("model_q4.onnx",), None, "model_q4.onnx"),
        (WEB, None, "model.onnx"),
        (WEB, "int4", "model.onnx"),  # the fp32 graph, which int4 is made from
        (WEB, "fp16", "model_fp16.onnx"),  # an ONNX graph in fp32 is not converted to fp16
        (WEB[1:], "int4", "model_q4.onnx"),
        (WEB[1:], "int8", "model_quantized.onnx"),
        ((*PARTS, "decoder_model_merged.onnx"), None, "decoder_model_merged.onnx"),
        (
            ("decoder_model_merged.onnx", "decoder_model_merged_fp16.onnx"),
            "fp16",
            "decoder_model_merged_fp16.onnx",
        ),
    ],
)
def test_the_graph_is_chosen_by_name_and_precision(
    names: tuple[str, ...], precision: str | None, chosen: str, folder: str, tmp_path: Path
) -> None:
    place = _with(tmp_path, names, folder)
    assert find_graph(place, precision) == place / folder / chosen


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (WEB[1:], UsageError, "give one of them: onnx/model_fp16.onnx, onnx/model_q4.onnx"),
        (PARTS, UsageError, "give one of them"),
        (
            ("decoder_model_merged.onnx", "embed_tokens.onnx", "vision_encoder.onnx"),
            UsageError,
            "give one of them",
        ),
        (tuple(f"part{i}.onnx" for i in range(40)), UsageError, "and 32 more"),
    ],
)
def test_an_ambiguous_choice_of_a_graph_is_refused(
    names: tuple[str, ...], error: type[LoraDeployError], message: str, tmp_path: Path
) -> None:
    place = _with(tmp_path, names)
    with pytest.raises(error, match=message) as problem:
        find_graph(place)
    assert len(str(problem.value).replace(str(place), "")) < 300


def test_the_choice_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = _with(tmp_path, WEB)
    with caplog.at_level(logging.WARNING):
        find_graph(place)
    (record,) = caplog.records
    assert "using onnx/model.onnx of 5 graphs" in record.message


def test_a_checkpoint_is_preferred_to_the_graphs_beside_it(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "m")
    assert resolve(_with(tmp_path / "m", WEB)).kind == "checkpoint"


@pytest.mark.parametrize("given", ["model.ort", "."])
def test_onnxruntimes_own_format_is_refused_by_name(given: str, tmp_path: Path) -> None:
    (tmp_path / "model.ort").touch()
    with pytest.raises(ModelError, match=r"own format, which cannot be changed: give the \.onnx"):
        resolve(tmp_path / given)


def test_training_refuses_a_directory_of_graphs(tmp_path: Path) -> None:
    place = _with(tmp_path, WEB)
    (place / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has ONNX graphs and no .safetensors"):
        find_checkpoint(place)


# -- the files above the graphs --------------------------------------------------------------------


@pytest.fixture(scope="session")
def repository(tiny_bert: Path, shared: Path) -> Path:
    """The tiny BERT in the layout of transformers.js: the graph in onnx/, other files above."""

    def make(place: Path) -> None:
        export_as_optimum(tiny_bert, place / "onnx" / "model.onnx")
        for file in tiny_bert.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, place)

    return once(shared / "web-bert", make)


@pytest.mark.parametrize("given", ["", "onnx/model.onnx"])
def test_config_and_tokenizer_are_found_above_the_graph(
    given: str, repository: Path, tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    import peft
    import torch
    from transformers import AutoModel, AutoTokenizer

    adapter = make_adapter(tiny_bert, task="feature-extraction", target_modules=["query", "value"])
    manifest = export(repository / given, tmp_path / "b", adapters={"one": adapter})
    assert manifest.base.name == repository.name
    vectors = TextEmbedder(AdapterSession(tmp_path / "b"))(["The bank"] * 2, ["one", None])
    ids = AutoTokenizer.from_pretrained(tiny_bert)("The bank", return_tensors="pt")["input_ids"]
    encoder = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_bert), adapter).eval()
    with torch.no_grad():
        mean = encoder(input_ids=ids).last_hidden_state[0].mean(dim=0)
    expected = torch.nn.functional.normalize(mean, dim=0).numpy()
    assert np.abs(vectors[0] - expected).max() <= tolerance("torch-onnx-tiny")
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01


def test_a_config_two_levels_up_is_not_used(repository: Path, tmp_path: Path) -> None:
    shutil.copy(repository / "config.json", tmp_path)
    shutil.copytree(repository / "onnx", tmp_path / "a" / "onnx")
    source = resolve(tmp_path / "a" / "onnx" / "model.onnx")
    assert (source.directory, source.name) == (tmp_path / "a" / "onnx", "a")


ENCODER, BOTH = "encoder_model", "decoder_model_merged"
FIRST, FURTHER = "decoder_model", "decoder_with_past_model"


@pytest.mark.parametrize(
    ("names", "precision", "found"),
    [
        ((ENCODER, FIRST, FURTHER, BOTH), None, (ENCODER, FIRST, FURTHER)),
        ((ENCODER, BOTH), None, (ENCODER, BOTH, BOTH)),
        (
            (ENCODER, BOTH, f"{ENCODER}_fp16", f"{BOTH}_fp16"),
            "fp16",
            (f"{ENCODER}_fp16", f"{BOTH}_fp16", f"{BOTH}_fp16"),
        ),
        ((ENCODER, BOTH, f"{ENCODER}_fp16", f"{BOTH}_fp16"), None, (ENCODER, BOTH, BOTH)),
        ((f"{ENCODER}_q4", f"{BOTH}_q4"), None, (f"{ENCODER}_q4", f"{BOTH}_q4", f"{BOTH}_q4")),
        ((ENCODER, BOTH, "model"), None, None),
        ((FIRST, FURTHER), None, None),
    ],
)
def test_the_parts_of_an_encoder_decoder_are_found(
    names: tuple[str, ...], precision: str | None, found: tuple[str, ...] | None, tmp_path: Path
) -> None:
    place = _with(tmp_path, tuple(f"{name}.onnx" for name in names))
    parts = find_parts(place, precision)
    got = parts and tuple(file.stem for file in (parts.encoder, parts.first, parts.further))
    assert got == found


@pytest.mark.parametrize(
    "names", [(ENCODER, FIRST), (f"{ENCODER}_q4", BOTH), (ENCODER, f"{BOTH}_fp16", f"{BOTH}_q4")]
)
def test_incomplete_parts_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    place = _with(tmp_path, tuple(f"{name}.onnx" for name in names))
    with pytest.raises(ModelError, match="an encoder-decoder in parts, but not encoder_model.onnx"):
        find_parts(place)
