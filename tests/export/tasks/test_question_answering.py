"""A model for question answering gives PEFT's logits of the start and the end of an answer."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import loradeploy as ld
from loradeploy.errors import UsageError
from tests.conftest import MakeAdapter
from tests.export.others import IDS
from tests.export.reference import difference
from tests.tolerances import tolerance

TASK = "question-answering"
OUTPUTS = ["start_logits", "end_logits"]


@pytest.fixture(scope="module")
def base(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with a head for question answering."""
    import torch
    from transformers import BertForQuestionAnswering

    place = tmp_path_factory.mktemp("qa") / "base"
    shutil.copytree(tiny_bert, place)
    torch.manual_seed(3)
    BertForQuestionAnswering.from_pretrained(tiny_bert).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def adapters(base: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    """Two adapters, each with its own head, as PEFT trains one for this task."""
    return {
        name: make_adapter(base, r=4, seed=seed, task=TASK, target_modules=["query", "value"])
        for seed, name in enumerate(("first", "second"), 1)
    }


def _of_peft(
    base: Path, adapter: Path | None, mask: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    import peft
    import torch
    from transformers import AutoModelForQuestionAnswering

    model = AutoModelForQuestionAnswering.from_pretrained(base).eval()
    used: Any = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        made = used(input_ids=torch.from_numpy(IDS), attention_mask=torch.from_numpy(mask))
    return {name: made[name].numpy() for name in OUTPUTS}


def _write_graph(base: Path, place: Path) -> Path:
    """Export as scripts do, by torch's older exporter."""
    import torch
    from transformers import AutoModelForQuestionAnswering

    model = AutoModelForQuestionAnswering.from_pretrained(base, attn_implementation="eager").eval()

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
            return self.model(input_ids=ids, attention_mask=mask, return_dict=False)[:2]

    place.mkdir()
    ids = torch.from_numpy(IDS)
    names = ["input_ids", "attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Plain(),
            (ids, torch.ones_like(ids)),
            place / "model.onnx",
            input_names=names,
            output_names=OUTPUTS,
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in [*names, *OUTPUTS]},
            opset_version=17,
            dynamo=False,
        )
    shutil.copy(base / "config.json", place)
    return place


@pytest.mark.parametrize("source", ["checkpoint", "graph"])
def test_each_row_has_the_logits_of_its_adapter(
    source: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    model, options = base, {}
    if source == "graph":
        model, options = _write_graph(base, tmp_path / "graph"), {"checkpoint": base}
    manifest = ld.export(model, tmp_path / "bundle", adapters=adapters, **options)
    assert (manifest.task, manifest.padding) == (TASK, "right")
    mask = np.ones_like(IDS)
    mask[1, 6:] = 0
    chosen: list[str | None] = ["first", "second", None]
    feeds = {"input_ids": IDS, "attention_mask": mask}
    if any(spec.name == "token_type_ids" for spec in manifest.inputs):
        feeds["token_type_ids"] = np.zeros_like(IDS)
    found = ld.AdapterSession(tmp_path / "bundle").run(OUTPUTS, feeds, adapters=chosen)
    of_base = _of_peft(base, None, mask)
    for row, name in enumerate(chosen):
        expected = of_base if name is None else _of_peft(base, adapters[name], mask)
        for output, values in zip(OUTPUTS, found, strict=True):
            seen = mask[row] == 1
            if name is not None:
                effect = difference(expected[output][row, seen], of_base[output][row, seen])
                assert effect > 0.01, "the adapter does nothing"
            error = difference(values[row, seen], expected[output][row, seen])
            assert error <= tolerance("torch-onnx-tiny")


def test_parity_holds_and_finds_mistakes(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    ld.export(base, tmp_path / "bundle", adapters=adapters)
    report = ld.parity(tmp_path / "bundle", model=base, controls=True)
    assert report.passed, report.failures
    assert report.controls and all(control.caught for control in report.controls)
    first = {"first": adapters["first"]}
    ld.export(base, tmp_path / "merged", adapters=first, merge=True)
    assert ld.parity(tmp_path / "merged", model=base, adapters=first).passed
    other = {"first": adapters["second"]}
    assert not ld.parity(tmp_path / "merged", model=base, adapters=other, certificate=False).passed


def test_it_is_run_by_a_session_alone(base: Path, tmp_path: Path) -> None:
    from loradeploy.cli.run import runner_of

    ld.export(base, tmp_path / "bundle")
    with pytest.raises(UsageError, match=r"is a question-answering bundle.*AdapterSession\.run"):
        runner_of(ld.AdapterSession(tmp_path / "bundle"))
