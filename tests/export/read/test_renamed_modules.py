"""Graphs and adapters of either version of transformers, which renamed the modules of ViT."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from tests.conftest import once
from tests.export.reference import difference
from tests.tolerances import tolerance

# The names of transformers 5, and those of transformers 4.
_EARLIER: Final = (
    (r"attention\.([qkv])_proj", r"attention.attention.\1"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"layers\.(\d)", r"encoder.layer.\1"),
    (r"attention\.q\b", "attention.query"),
    (r"attention\.k\b", "attention.key"),
    (r"attention\.v\b", "attention.value"),
)
PIXELS = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)


def _earlier(name: str) -> str:
    for new, old in _EARLIER:
        name = re.sub(new, old, name)
    return name


@pytest.fixture(scope="module")
def vit(shared: Path) -> Path:
    """A random ViT classifier, in a directory."""

    def make(place: Path) -> None:
        import torch
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            num_labels=3,
            initializer_range=0.3,
        )
        ViTForImageClassification(config).save_pretrained(place)

    return once(shared / "renamed-vit", make)


@pytest.fixture(scope="module")
def trained(vit: Path, shared: Path) -> Path:
    """A random adapter that PEFT wrote, with the module names of the installed transformers."""

    def make(place: Path) -> None:
        import peft
        import torch
        from transformers import ViTForImageClassification

        torch.manual_seed(3)
        model = ViTForImageClassification.from_pretrained(vit)
        targets = ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)
        )
        for name, values in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(values, std=0.3)
        model.save_pretrained(place)

    return once(shared / "renamed-vit-adapter", make)


def _graph(vit: Path, place: Path, *, earlier: bool) -> None:
    import torch
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(vit, attn_implementation="eager").eval()
    forward = model.forward
    model.forward = lambda pixels: forward(pixels, return_dict=False)[0]
    place.mkdir()
    file = place / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter is deprecated but still used
        torch.onnx.export(
            model,
            (torch.from_numpy(PIXELS),),
            file,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_axes={"pixel_values": {0: "batch"}, "logits": {0: "batch"}},
            dynamo=False,
        )
    (place / "config.json").write_text((vit / "config.json").read_text())
    if earlier:
        graph = onnx.load(file)
        for node in graph.graph.node:
            path = _earlier(node.name.strip("/").replace("/", "."))
            node.name = "/" + "/".join(re.split(r"\.(?!\d)", path))
        onnx.save(graph, file)


def _with_earlier_names(adapter: Path, place: Path) -> Path:
    place.mkdir()
    weights = load_file(adapter / "adapter_model.safetensors")
    renamed = {_earlier(name): values for name, values in weights.items()}
    save_file(renamed, place / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["query", "value", "dense"]
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("evidence", ["names", "checkpoint"])
@pytest.mark.parametrize("adapter_of", ["transformers 4", "transformers 5"])
@pytest.mark.parametrize("graph_of", ["transformers 4", "transformers 5"])
def test_an_adapter_of_either_version_changes_a_graph_of_either_version(
    graph_of: str,
    adapter_of: str,
    evidence: str,
    vit: Path,
    trained: Path,
    tmp_path: Path,
) -> None:
    import peft
    import torch
    from transformers import ViTForImageClassification

    _graph(vit, tmp_path / "graph", earlier=graph_of == "transformers 4")
    adapter = trained
    if adapter_of == "transformers 4":
        adapter = _with_earlier_names(trained, tmp_path / "earlier")
    given = {"checkpoint": vit} if evidence == "checkpoint" else {}
    export(tmp_path / "graph", tmp_path / "bundle", adapters={"mine": adapter}, **given)
    session = AdapterSession(tmp_path / "bundle")
    session.load("again", adapter)
    feeds = {"pixel_values": PIXELS}
    base, adapted, again = (
        session.run(["logits"], feeds, adapters=name)[0] for name in (None, "mine", "again")
    )
    model = ViTForImageClassification.from_pretrained(vit).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(PIXELS)).logits.numpy()
        assert difference(base, expected) < tolerance("torch-onnx-tiny")
        model = peft.PeftModel.from_pretrained(model, trained).eval()
        expected = model(torch.from_numpy(PIXELS)).logits.numpy()
    assert difference(adapted, expected) < tolerance("torch-onnx-tiny")
    assert difference(again, expected) < tolerance("torch-onnx-tiny")
    assert difference(base, adapted) > 0.1, "the adapter did nothing"
