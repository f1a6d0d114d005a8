"""The probe at opening detects devices that drop, exchange or scale the effect of adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import loradeploy as ld
from loradeploy.adapter.heads import Head
from loradeploy.bundle.adapter_inputs.changes import change_inputs
from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.model_config import model_config
from loradeploy.errors import BundleError, DeviceError
from loradeploy.runtime.adapters.resident import FittedAdapter
from loradeploy.runtime.devices import table
from loradeploy.runtime.devices.effect import PROBE, check_effect, probe
from loradeploy.runtime.reading.wire import node_names, without_defaults
from loradeploy.runtime.timing import sample_feeds

ROW = table.known("NewExecutionProvider")
Change = Callable[[Any], Any]


class Device:
    """A session as a device that computes wrongly.

    `adapters` changes the adapters of a run, `outputs` its outputs.
    """

    def __init__(
        self,
        session: ld.AdapterSession,
        adapters: Change = lambda adapters: adapters,
        outputs: Change = lambda values: values,
    ) -> None:
        self._session, self._adapters, self._outputs = session, adapters, outputs
        self.empty_cache = session.empty_cache

    @contextmanager
    def hold(self, adapters: Any) -> Iterator[Any]:
        with self._session.hold(self._adapters(adapters)) as held:
            run = held.run
            held.run = lambda *given: [self._outputs(values) for values in run(*given)]
            yield held


@pytest.fixture(scope="module")
def sessions(tiny_bert_bundle: Path) -> tuple[ld.AdapterSession, ld.AdapterSession]:
    """Two sessions on the tiny classifier with the probe adapter, doubled in the second one."""
    pair = ld.AdapterSession(tiny_bert_bundle), ld.AdapterSession(tiny_bert_bundle)
    for session, scale in zip(pair, (1, 2), strict=True):
        arrays = probe(session.manifest, session._loader.reader.defaults())
        for target in session.manifest.targets:
            arrays[target.lora_B] *= scale
        session._bank.add(PROBE, partial(FittedAdapter, arrays, PROBE, Head()))
    return pair


def _check(device: Any, host: ld.AdapterSession) -> None:
    check_effect(device, host, host.manifest, model_config(host.path), ROW)


def test_a_device_that_computes_the_same_passes(
    sessions: tuple[ld.AdapterSession, ld.AdapterSession],
) -> None:
    _check(sessions[0], sessions[0])


@pytest.mark.parametrize(
    ("adapters", "fault"),
    [
        (lambda adapters: None, "with an adapter"),  # ignored
        (lambda adapters: adapters and adapters[::-1], "with an adapter"),  # rows exchanged
        (lambda adapters: PROBE, "the base"),  # always with an adapter
    ],
    ids=["dropped", "reversed", "stuck"],
)
def test_a_device_that_uses_other_adapters_is_refused(
    sessions: tuple[ld.AdapterSession, ld.AdapterSession],
    adapters: Change,
    fault: str,
) -> None:
    with pytest.raises(DeviceError, match=rf"NewExecutionProvider computes .* \({fault}\)"):
        _check(Device(sessions[0], adapters), sessions[0])


def test_a_doubled_scale_is_refused(
    sessions: tuple[ld.AdapterSession, ld.AdapterSession],
) -> None:
    with pytest.raises(DeviceError, match="with an adapter"):
        _check(sessions[1], sessions[0])


def test_nan_outputs_are_refused(
    sessions: tuple[ld.AdapterSession, ld.AdapterSession],
) -> None:
    broken = Device(sessions[0], outputs=lambda values: values * np.nan)
    with pytest.raises(DeviceError, match="the base"):
        _check(broken, sessions[0])


def test_the_probe_touches_every_side_input(tiny_bert_bundle: Path) -> None:
    session = ld.AdapterSession(tiny_bert_bundle)
    defaults = session._loader.reader.defaults()
    arrays = probe(session.manifest, defaults)
    chosen = {spec.name for spec in session.manifest.side_inputs() if spec.dtype != "int64"}
    assert arrays.keys() == chosen
    neutral = change_inputs(session.manifest)
    assert all(
        np.abs(values - defaults.get(name, neutral.get(name, 0))).max() > 0
        for name, values in arrays.items()
    )


# -- providers that need every input -------------------------------------------------------------


def test_a_provider_without_defaults_and_rank_0_gets_all_inputs(
    tiny_llama_bundle: Path, llama_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ld.AdapterSession(tiny_llama_bundle)
    row = table.BY_FULL_NAME[table.CPU]
    strict = dataclasses.replace(row, takes_defaults=False, takes_rank_zero=False)
    monkeypatch.setitem(table.BY_FULL_NAME, table.CPU, strict)
    fed = ld.AdapterSession(tiny_llama_bundle)
    assert not fed._session.get_overridable_initializers()
    feeds = sample_feeds(plain, 2, past=0, new=4)
    for session in (plain, fed):
        session.load("partial", llama_adapters["partial"])
    base = plain.run(["logits"], feeds)[0]
    for adapters in (None, "partial", ["partial", None]):
        expected = plain.run(["logits"], feeds, adapters)[0]
        assert np.abs(fed.run(["logits"], feeds, adapters)[0] - expected).max() < 1e-5
        assert adapters is None or np.abs(expected - base).max() > 0.1


def test_a_graph_without_defaults_is_otherwise_equal(tiny_llama_bundle: Path) -> None:
    names = [spec.name for spec in read_manifest(tiny_llama_bundle).side_inputs()]
    content = (tiny_llama_bundle / "model.onnx").read_bytes()
    before, after = onnx.ModelProto(), onnx.ModelProto()
    before.ParseFromString(content)
    after.ParseFromString(without_defaults(content, names))
    kept = [tensor for tensor in before.graph.initializer if tensor.name not in names]
    assert len(kept) + len(names) == len(before.graph.initializer)
    del before.graph.initializer[:]
    before.graph.initializer.extend(kept)
    assert after == before


def test_nodes_are_found_in_branches_too() -> None:
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("And", ["a", "b"], ["c"], name="inside")], "branch", [], []
    )
    nodes = [
        onnx.helper.make_node("If", ["a"], ["d"], name="if", then_branch=inner, else_branch=inner),
        onnx.helper.make_node("Or", ["a", "b"], ["e"], name="outside"),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))
    content = model.SerializeToString()
    assert node_names(content, ("And", "Or")) == ["inside", "inside", "outside"]
    with pytest.raises(BundleError, match="not an ONNX model"):
        node_names(content[:-3], ("And",))
    model.graph.node[1].name = ""
    with pytest.raises(BundleError, match="has no name"):
        node_names(model.SerializeToString(), ("Or",))
