"""Adapters that contain weights or token rows of the base, used with an existing graph."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import loradeploy as ld
from loradeploy.adapter import Adapter, AdapterConfig, load_adapter, save_adapter
from loradeploy.adapter.adapter import Rows
from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter
from loradeploy.bundle.graph_form import form_of
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import AdapterMismatchError, LoraDeployError
from tests.cli.calling import call
from tests.conftest import MakeAdapter, once
from tests.export.reference import apart, onnx_output, token_feeds
from tests.export.reference import session as ort
from tests.tolerances import tolerance

# PEFT warns about tied embeddings.
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = np.array([[5, 17, 3, 101, 5, 44, 260]])
BROUGHT: dict[str, dict[str, Any]] = {
    "whole": {"whole": 0.1},
    "head": {"whole": 0.1, "only": ("lm_head.weight",)},
    "embedding": {"whole": 0.1, "only": ("model.embed_tokens.weight",)},
    "copies": {"whole": 0.0},
    "rows": {"trainable_token_indices": [3, 17]},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [3, 17], "lm_head": [9]}},
}


def _made(model: Path, place: Path, options: dict[str, Any]) -> None:
    """Write an adapter on q_proj with copies of base weights, changed ones, or trained rows."""
    import peft
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    rest = dict(options)
    size, only = rest.pop("whole", None), rest.pop("only", None)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model)
    made = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **rest)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    made.save_pretrained(place, save_embedding_layers=size is not None)
    if size is not None:
        file = place / "adapter_model.safetensors"
        tensors = load_file(file)
        for key in [key for key in tensors if "lora_" not in key]:
            if only is not None and not key.endswith(only):
                del tensors[key]
            else:
                torch.manual_seed(1)  # equal weights get equal changes
                tensors[key] = tensors[key] + size * torch.randn_like(tensors[key])
        save_file(tensors, file, metadata={"format": "pt"})


def _logits(model: Path, adapter: Path | None) -> NDArray[np.float32]:
    """Return PEFT's logits."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(model).eval()
    if adapter is not None:
        made = peft.PeftModel.from_pretrained(made, adapter).eval()
    with torch.no_grad():
        found: NDArray[np.float32] = made(torch.tensor(IDS)).logits.numpy()
    return found


@pytest.fixture(scope="module")
def bringing(shared: Path) -> Callable[[Path, str], Path]:
    """A function (model, contents) → PEFT directory."""

    def make(model: Path, what: str) -> Path:
        place = shared / "bringing" / f"{model.name}-{what.replace(' ', '-')}"
        return once(place, lambda partial: _made(model, partial, BROUGHT[what]))

    return make


@pytest.fixture(scope="module")
def tied_llama(tiny_llama: Path, shared: Path) -> Path:
    """The tiny Llama with a head tied to its embedding."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(place: Path) -> None:
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(place)

    return once(shared / "tied-llama", make)


@pytest.fixture(scope="module")
def tied_bundle(tied_llama: Path, shared: Path) -> Path:
    return once(shared / "bundle-tied-llama", lambda place: ld.export(tied_llama, place))


@pytest.fixture
def base(tied: bool, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """The tiny Llama, with a tied or an untied head, and its bundle."""
    names = ("tied_llama", "tied_bundle") if tied else ("tiny_llama", "tiny_llama_bundle")
    model, bundle = map(request.getfixturevalue, names)
    return model, bundle


@pytest.mark.breadth(3)
@pytest.mark.parametrize("what", BROUGHT)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merged_into_a_bundle_the_adapter_computes_what_peft_computes(
    what: str,
    tied: bool,
    bringing: Callable[[Path, str], Path],
    base: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    model, bundle = base
    adapter = bringing(model, what)
    read = load_adapter(adapter)
    assert read.carried or read.rows
    try:
        ld.export(bundle, tmp_path / "merged", adapters={"a": adapter}, merge=True)
    except AdapterMismatchError as refusal:
        assert tied, refusal
        assert what == "rows of both", refusal  # different rows: PEFT unties the head
        return
    expected = _logits(model, adapter)
    merged = onnx_output(tmp_path / "merged", IDS)
    assert np.abs(merged - expected).max() <= tolerance("torch-onnx-tiny")
    assert np.abs(expected - _logits(model, None)).max() > 0.01, "it does nothing"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_session_without_torch_accepts_copies_of_base_weights(
    tied: bool,
    bringing: Callable[[Path, str], Path],
    base: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    model, bundle = base
    adapter = bringing(model, "copies")
    assert load_adapter(adapter).carried
    program = """
import json, sys
for name in ("torch", "transformers", "onnx"):
    sys.modules[name] = None
import numpy as np, loradeploy as ld
bundle, adapter, out, ids = sys.argv[1:]
session = ld.AdapterSession(bundle)
session.register("a", adapter)
session.load("b", adapter)
ids = np.array(json.loads(ids))
feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
feeds["position_ids"] = np.arange(ids.shape[1])[None]
for spec in session.manifest.inputs:
    if spec.name.startswith("past_key_values."):
        feeds[spec.name] = np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
feeds = {name: np.repeat(values, 2, axis=0) for name, values in feeds.items()}
np.save(out, session.run(["logits"], feeds, ["a", "b"])[0])
"""
    out = tmp_path / "logits.npy"
    arguments = [str(bundle), str(adapter), str(out), str(IDS.tolist())]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    expected = _logits(model, adapter)
    assert np.abs(np.load(out) - expected).max() <= tolerance("torch-onnx-tiny")
    assert np.abs(expected - _logits(model, None)).max() > 0.01, "it does nothing"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("what", [name for name in BROUGHT if name != "copies"])
def test_a_session_refuses_changed_base_weights(
    what: str,
    tied: bool,
    bringing: Callable[[Path, str], Path],
    base: tuple[Path, Path],
) -> None:
    model, bundle = base
    session = ld.AdapterSession(bundle)
    with pytest.raises(AdapterMismatchError, match="merge it instead"):
        session.load("a", bringing(model, what))
    assert "a" not in session.adapters


@pytest.fixture(scope="module")
def with_tokens(
    tied_bundle: Path, tiny_llama: Path, bringing: Callable[[Path, str], Path], shared: Path
) -> Callable[[bool], Path]:
    """Bundles that accept trained rows: tied for adapters loaded later, untied for a given one."""

    def make(tied: bool) -> Path:
        def export(place: Path) -> None:
            if tied:
                ld.export(tied_bundle, place, side_inputs=["tokens"])
            else:
                given = {"given": bringing(tiny_llama, "rows of both")}
                ld.export(tiny_llama, place, adapters=given)

        return once(shared / f"bundle-tokens-{tied}", export)

    return make


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_trained_rows_are_side_inputs_of_one_row_of_a_batch(
    tied: bool,
    bringing: Callable[[Path, str], Path],
    with_tokens: Callable[[bool], Path],
    base: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    model, _ = base
    directory = with_tokens(tied)
    assert "tokens" in form_of(read_manifest(directory)).side_inputs
    given = {
        what: bringing(model, what) for what in (["rows"] if tied else ["rows", "rows of both"])
    }
    session = ld.AdapterSession(directory)
    for what, place in given.items():
        session.load(what, place)
    rows = [None, *given, None]
    batch = np.repeat(IDS, len(rows), axis=0)
    found = session.run(["logits"], token_feeds(ort(directory), batch), rows)[0]
    for row, what in zip(found, rows, strict=True):
        expected = _logits(model, None if what is None else given[what])[0]
        assert np.abs(row - expected).max() <= tolerance("torch-onnx-tiny"), what
    assert np.abs(found[0] - found[1]).max() > 0.01, "it does nothing"
    # Convert to ONNX Runtime's format and back, to an adapter with factors of the embedding.
    native, back = tmp_path / "a.onnx_adapter", tmp_path / "back"
    call("convert", given["rows"], "--bundle", directory, "--output", native)
    side = read_onnx_adapter(native)
    assert np.abs(onnx_output(directory, IDS, side=side) - found[1]).max() < 1e-6
    call("convert", native, "--bundle", directory, "--output", back)
    assert load_adapter(back).factors["model.embed_tokens"].rank == 2
    assert np.abs(_logits(model, back) - found[1]).max() <= tolerance("torch-onnx-tiny")
    facts = json.loads(call("inspect", given["rows"], "--json"))
    assert facts["tokens"] == ["model.embed_tokens.weight: 2"]


def test_a_quantized_export_computes_its_trained_rows_and_its_session_refuses_others(
    tied_llama: Path,
    bringing: Callable[[Path, str], Path],
    with_tokens: Callable[[bool], Path],
    tmp_path: Path,
) -> None:
    adapter = bringing(tied_llama, "rows")
    ld.export(with_tokens(True), tmp_path / "b", adapters={"a": adapter}, precision="int8")
    session = ld.AdapterSession(tmp_path / "b")
    session.load("a")
    batch = np.repeat(IDS, 2, axis=0)
    base, adapted = session.run(["logits"], token_feeds(ort(tmp_path / "b"), batch), [None, "a"])[0]
    effect = _logits(tied_llama, adapter)[0] - _logits(tied_llama, None)[0]
    assert apart(adapted - base, effect) <= tolerance("export-int8")
    with pytest.raises(AdapterMismatchError, match="export the unquantized base with this adapter"):
        session.load("b", adapter)


def test_more_trained_rows_than_the_side_inputs_have_are_refused_with_the_numbers(
    tied_llama: Path, with_tokens: Callable[[bool], Path], tmp_path: Path
) -> None:
    many = {"trainable_token_indices": list(range(65))}
    _made(tied_llama, tmp_path / "many", many)
    session = ld.AdapterSession(with_tokens(True))
    with pytest.raises(AdapterMismatchError, match="65 of them, .* at most 64: merge it"):
        session.load("many", tmp_path / "many")


def test_a_tied_head_is_not_a_side_input_for_changed_base_weights(
    tied_llama: Path,
    bringing: Callable[[Path, str], Path],
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    own = make_adapter(tied_llama, target_modules=["q_proj"], modules_to_save=["lm_head"])
    ld.export(tied_llama, tmp_path / "bundle", adapters={"own": own})
    session = ld.AdapterSession(tmp_path / "bundle")
    session.load("own")
    # PEFT changes the embedding too, which a graph with side inputs keeps.
    with pytest.raises(AdapterMismatchError, match="lm_head.weight .* merge it instead"):
        session.load("head", bringing(tied_llama, "head"))


@pytest.mark.breadth(2)
@pytest.mark.parametrize("what", ["whole", "rows of both"])
def test_an_adapter_is_complete_after_extraction_and_after_conversion(
    what: str, bringing: Callable[[Path, str], Path], tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from loradeploy.lora.inject import load

    before = load_adapter(bringing(tiny_llama, what))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert load(model, before).adapter().digest == before.digest
    call("convert", bringing(tiny_llama, what), "--rank", "2", "--output", tmp_path / "lower")
    after = load_adapter(tmp_path / "lower")
    assert after.digest == ld.reduce_rank(before, 2)[0].digest
    assert (after.carried.keys(), after.rows.keys()) == (before.carried.keys(), before.rows.keys())
    expected = _logits(tiny_llama, tmp_path / "lower")
    ld.export(tiny_llama, tmp_path / "merged", adapters={"a": tmp_path / "lower"}, merge=True)
    merged = onnx_output(tmp_path / "merged", IDS)
    assert np.abs(merged - expected).max() <= tolerance("torch-onnx-tiny")


def test_convert_refuses_adapters_that_the_bundle_does_not_support(
    bringing: Callable[[Path, str], Path],
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "a.onnx_adapter"
    for what in ("whole", "rows"):
        with pytest.raises(AdapterMismatchError, match="merge it instead"):
            call(
                "convert",
                bringing(tiny_llama, what),
                "--bundle",
                tiny_llama_bundle,
                "--output",
                out,
            )
    assert not out.exists()


@pytest.mark.parametrize("how", ["an adapter", "asked for"])
def test_trained_rows_of_an_encoder_decoder_are_merged_and_no_other_way_is_recommended(
    how: str, tiny_t5: Path, tmp_path: Path
) -> None:
    rows = Rows((5, 6), np.ones((2, 48), np.float32))
    config = AdapterConfig(
        task_type="SEQ_2_SEQ_LM", extra={"trainable_token_indices": {"shared": [5, 6]}}
    )
    save_adapter(Adapter(config, {}, rows={"shared.weight": rows}), tmp_path / "rows")
    with pytest.raises(LoraDeployError, match="merge") as refusal:
        if how == "an adapter":
            ld.export(tiny_t5, tmp_path / "b", adapters={"rows": tmp_path / "rows"})
        else:
            ld.export(tiny_t5, tmp_path / "b", side_inputs=["tokens"])
    assert "--side-inputs" not in str(refusal.value)
    assert "side_inputs=" not in str(refusal.value)
