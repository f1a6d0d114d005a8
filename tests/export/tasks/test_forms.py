"""The options for the form of a graph with other tasks than causal-lm: obeyed, or refused by name.

tests/export/test_graph_form.py has all pairs of them for a decoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loradeploy.bundle.graph_form import form_of
from loradeploy.bundle.manifest import Manifest, read_manifest
from loradeploy.bundle.names import is_cross
from loradeploy.bundle.sample import Sample
from loradeploy.errors import LoraDeployError
from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter, once
from tests.export.reference import apart, factors, session
from tests.tolerances import tolerance

Form = dict[str, Any]

# By name: the fixture of the model, the task, and the task of its random adapter.
MODELS = {
    "encoder": ("tiny_bert", "feature-extraction", "feature-extraction"),
    "classifier": ("tiny_bert", "sequence-classification", "sequence-classification"),
    "text to text": ("tiny_t5", "seq2seq-lm", "seq2seq-lm"),
    "speech": ("tiny_whisper", "seq2seq-lm", "speech"),
}
FORMS: tuple[Form, ...] = (
    {"precision": "int8", "operator": True},
    {"precision": "int8", "operator": True, "branches": True, "fixed": {"batch": 2}},
    {"precision": "int4", "branches": True, "required_inputs": True},
    {"precision": "int4", "layout": "slots", "fixed": {"batch": 2}},
    {"precision": "int8", "quantize_embedding": True, "layout": "rows"},
    {"precision": "fp16", "layout": "slots"},
    {"precision": "bf16", "layout": "rows", "side_inputs": ("dora",)},
    {"operator": True, "side_inputs": ("dora",)},
    {"side_inputs": ("embedding",), "fixed": {"batch": 2}},
    {"target": "cuda", "layout": "slots"},
    {"target": "openvino", "layout": "rows"},
    {"target": "web", "precision": "int8"},
    {"merge": True, "precision": "int4", "operator": True},
    {"merge": True, "precision": "fp16", "fixed": {"batch": 2}},
    {"attention": "gqa"},
    {"logits_to_keep": True},
)
# Words of the refusal of an option: of encoder-decoders, and of every other task than causal-lm.
OF_HALVES = {
    **dict.fromkeys(("operator", "branches", "required_inputs"), "not for encoder-decoders"),
    "quantize_embedding": "leave it out",
}
OF_ALL = {"attention": "is for decoders with a cache", "logits_to_keep": "`logits_to_keep`"}


def refusal(form: Form, model: str) -> str | None:
    """The words of the refusal of a form, None for an allowed one."""
    halves = MODELS[model][1] == "seq2seq-lm"
    words = {**OF_ALL, **(OF_HALVES if halves else {})}
    if halves and form.get("target") in ("openvino", "web"):
        return f"`target='{form['target']}'` has `required_inputs`"
    return next((words[name] for name, value in form.items() if value and name in words), None)


def feeds(manifest: Manifest) -> dict[str, NDArray[Any]]:
    """Return inputs of a first call; the encoder computes what the decoder takes from it."""
    made = Sample(manifest.inputs, {"vocab_size": 64}).feeds()
    return {name: values for name, values in made.items() if not is_cross(name)}


def output(bundle: Path, adapter: Path | None) -> NDArray[Any]:
    """The main output, of all rows with one adapter or the base."""
    manifest = read_manifest(bundle)
    with AdapterSession(bundle) as opened:
        if adapter is not None and manifest.mode != "merged":
            opened.load("one", adapter)
            adapters = "one"
        else:
            adapters = None
        return opened.run([manifest.outputs[0].name], feeds(manifest), adapters)[0]


def plain_output(bundle: Path, adapter: Path | None) -> NDArray[Any]:
    """The same, of onnxruntime's session on the graph."""
    manifest = read_manifest(bundle)
    side = {} if adapter is None or manifest.mode == "merged" else factors(bundle, adapter)
    found: NDArray[Any] = session(bundle).run(
        [manifest.outputs[0].name], {**feeds(manifest), **side}
    )[0]
    return found


def name_of(form: Form) -> str:
    return " ".join(f"{name}={value}" for name, value in form.items())


@pytest.mark.breadth(3)
@pytest.mark.parametrize("form", FORMS, ids=name_of)
@pytest.mark.parametrize("model", MODELS)
def test_a_form_is_obeyed_with_the_same_numbers_or_refused(
    model: str,
    form: Form,
    request: pytest.FixtureRequest,
    make_adapter: MakeAdapter,
    shared: Path,
    tmp_path: Path,
) -> None:
    fixture, task, kind = MODELS[model]
    checkpoint: Path = request.getfixturevalue(fixture)
    adapter = make_adapter(checkpoint, task=kind, scale=0.3)
    bundle = tmp_path / "b"
    if (words := refusal(form, model)) is not None:
        with pytest.raises(LoraDeployError, match=words):
            export(checkpoint, bundle, adapters={"one": adapter}, task=task, **form)
        assert not bundle.exists()
        return
    manifest = export(checkpoint, bundle, adapters={"one": adapter}, task=task, **form)
    has = form_of(manifest)
    for name, value in form.items():
        if name == "side_inputs":
            assert set(value) <= has.side_inputs
        else:
            assert value == (dict(has.static_shapes) if name == "fixed" else getattr(has, name))
    reference = once(
        shared / "forms" / f"reference-{model.replace(' ', '-')}",
        lambda place: export(checkpoint, place, task=task, layout="slots", branches=False),
    )
    expected = output(reference, adapter)
    precision = has.precision
    limit = tolerance("same-torch" if precision == "fp32" else f"export-{precision}")
    assert apart(output(bundle, adapter), expected) <= limit
    if manifest.encoder is None:
        assert apart(plain_output(bundle, adapter), expected) <= limit
    if not form.get("merge"):
        base, found = output(reference, None), output(bundle, None)
        # The base of a classifier has no head: its logits are zeros.
        assert apart(found, base) <= limit if base.any() else not found.any()
    assert np.abs(expected - output(reference, None)).max() > 0.05, "the adapter has an effect"
