"""Sessions with the operator compute what sessions without it compute, on the same bundle."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.names import (
    ADAPTER_IDS,
    ADAPTER_RANKS,
    MAT_MUL_N_BITS_OPERATOR,
    OPERATOR_DOMAIN,
)
from loradeploy.errors import BundleError, OperatorError, UsageError
from loradeploy.runtime.engine.engine import Engine
from loradeploy.runtime.operator.library import check_library
from loradeploy.runtime.reading.weights import _HAS_IN_PLACE, SessionInPlace
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.export.reference import apart
from tests.runtime.adapters.test_rows import MIXES
from tests.runtime.feeds import feeds, logits, random_ids, rows_of
from tests.tolerances import tolerance


def opened(bundle: Path, adapters: dict[str, Path], operator: Path | None) -> AdapterSession:
    session = AdapterSession(bundle, operator=operator)
    for name, path in adapters.items():
        session.load(name, path)
    return session


@pytest.fixture(scope="module")
def sessions(
    operator_bundle: Path, llama_adapters: dict[str, Path], operator_library: Path
) -> Iterator[tuple[AdapterSession, AdapterSession]]:
    """The session without and the one with the operator."""
    with (
        opened(operator_bundle, llama_adapters, None) as plain,
        opened(operator_bundle, llama_adapters, operator_library) as fast,
    ):
        yield plain, fast


Sessions = tuple[AdapterSession, AdapterSession]


def check_close(found: NDArray[Any], expected: NDArray[Any], sessions: Sessions) -> None:
    """Check logits; int8 and int4 round activations, which enlarges a difference in rounding."""
    precision = sessions[0].manifest.precision
    if precision == "fp32":
        assert np.abs(found - expected).max() <= tolerance("torch-onnx-tiny")
    else:
        assert apart(found, expected) <= tolerance("export-int8")


def placed(session: AdapterSession) -> dict[str, int]:
    """The number of nodes that each operator of the library runs."""
    counts = session.placement["CPUExecutionProvider"]
    own = f"{OPERATOR_DOMAIN}."
    return {name.removeprefix(own): n for name, n in counts.items() if name.startswith(own)}


def calls(bundle: Path) -> dict[str, int]:
    """The number of calls of each function in the graph and its branches."""
    nodes = ir.load(bundle / "model.onnx").graph.all_nodes()
    return dict(Counter(node.op_type for node in nodes if node.domain == OPERATOR_DOMAIN))


def test_weights_that_no_kernel_packs_are_not_copied(
    operator_bundle: Path, operator_library: Path, tmp_path: Path
) -> None:
    """onnxruntime uses them in private memory, which a writer of the file does not change."""
    bundle = shutil.copytree(operator_bundle, tmp_path / "bundle")
    session = AdapterSession(bundle, operator=operator_library)
    packed = MAT_MUL_N_BITS_OPERATOR not in session.manifest.operators
    assert isinstance(session._session, SessionInPlace) is (not packed and _HAS_IN_PLACE)
    ids = random_ids(2, 6)
    expected = logits(session, ids, None)
    data = bundle / "model.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))
    gc.collect()
    assert np.array_equal(logits(session, ids, None), expected)


def test_the_library_runs_every_call_and_otherwise_the_function_is_inlined(
    sessions: Sessions, operator_library: Path
) -> None:
    plain, fast = sessions
    kernels = check_library(operator_library)
    expected = {name: count for name, count in calls(fast.path).items() if name in kernels}
    assert set(plain.manifest.operators) == calls(fast.path).keys()
    assert expected
    assert (placed(plain), placed(fast)) == ({}, expected)
    assert fast.provider.operator
    assert "with the operators" in str(fast.provider)
    assert not plain.provider.operator


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
def test_both_compute_the_same_rows(sessions: Sessions, rows: list[str | None]) -> None:
    ids = random_ids(len(rows), 9)
    expected, found = (logits(session, ids, rows) for session in sessions)
    check_close(found, expected, sessions)
    if any(rows):
        assert np.abs(found - logits(sessions[1], ids)).max() > 0.05


@pytest.mark.parametrize(
    "adapter", [None, "small", "large", "partial", {"small": 0.5, "large": -2.0}], ids=str
)
def test_both_compute_the_same_with_one_adapter(sessions: Sessions, adapter: Any) -> None:
    ids = random_ids(2, 9)
    expected, found = (logits(session, ids, adapter) for session in sessions)
    check_close(found, expected, sessions)


def test_a_wrong_adapter_differs_by_more_than_the_tolerance(sessions: Sessions) -> None:
    plain, fast = sessions
    ids = random_ids(3, 9)
    wrong = logits(fast, ids, ["large", "small", None])
    right = logits(plain, ids, ["small", "large", None])
    with pytest.raises(AssertionError):
        check_close(wrong, right, sessions)


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
def test_each_row_of_a_mixed_batch_equals_its_solo_run(
    sessions: Sessions, rows: list[str | None]
) -> None:
    _, fast = sessions
    if "int" in fast.manifest.precision:
        pytest.skip("rows of DynamicQuantizeMatMul share a scale")
    batch = feeds(fast.manifest, random_ids(len(rows), 9))
    (mixed,) = fast.run(["logits"], batch, rows)
    for row, adapter in enumerate(rows):
        (solo,) = fast.run(["logits"], rows_of(batch, row), adapter)
        assert np.abs(mixed[row] - solo[0]).max() <= tolerance("rows"), row


def test_a_stack_has_the_ranks_of_its_adapters(sessions: Sessions) -> None:
    _, fast = sessions
    if not fast.manifest.takes_ranks:
        pytest.skip("low-rank updates in the layout rows are no calls")
    with fast.hold(["small", "partial", None]) as held:
        ranks = held.lease.device.values[ADAPTER_RANKS].numpy()
        assert held.lease.adapter_ids is not None
        small, partial, base = ranks[held.lease.adapter_ids.numpy()]
    kinds = [target.module.rpartition(".")[2] for target in fast.manifest.targets]
    linear = [target.kind == "linear" for target in fast.manifest.targets]
    assert small[linear].tolist() == [4] * sum(linear)
    assert partial.tolist() == [8 * (kind in ("q_proj", "down_proj")) for kind in kinds]
    assert not base.any()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the arena is kept")
def test_memory_of_runs_is_the_c_librarys_unless_a_user_sets_the_options(
    sessions: Sessions, operator_library: Path
) -> None:
    """onnxruntime's arena would keep the memory of the longest prompt."""
    plain, fast = sessions
    options = onnxruntime.SessionOptions()
    with AdapterSession(fast.path, session_options=options, operator=operator_library) as given:
        found = [s._session.get_session_options() for s in (plain, fast, given)]
    assert [each.enable_cpu_mem_arena for each in found] == [True, False, True]


def test_several_threads_of_the_session_give_the_same(
    in_place_operator: Path, llama_adapters: dict[str, Path], operator_library: Path
) -> None:
    found = []
    for threads in (1, 3):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = AdapterSession(
            in_place_operator, session_options=options, operator=operator_library
        )
        for name, path in llama_adapters.items():
            session.load(name, path)
        found.append(logits(session, random_ids(4, 30), ["small", "large", None, "partial"]))
    assert np.abs(found[0] - found[1]).max() <= tolerance("rows")


def test_texts_of_mixed_batches_are_the_same(
    in_place_operator: Path, llama_adapters: dict[str, Path], operator_library: Path
) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [15]]
    rows = ["small", "large", None, "partial"]
    texts = []
    for operator in (None, operator_library):
        with opened(in_place_operator, llama_adapters, operator) as session:
            found = TextGenerator(session).generate(prompts, adapters=rows, max_new_tokens=12)
            texts.append([each.token_ids for each in found])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == len(rows)


def test_the_engine_serves_adapters_of_several_ranks(
    in_place_operator: Path, llama_adapters: dict[str, Path], operator_library: Path
) -> None:
    prompt = [5, 6, 7, 8]
    rows = ["small", "large", None, "partial", "large", "small"]
    with opened(in_place_operator, llama_adapters, operator_library) as session:
        alone = [
            TextGenerator(session).generate([prompt], adapters=[name], max_new_tokens=10)[0]
            for name in rows
        ]
        with Engine(session, max_rows=4) as engine:
            running = [engine.submit(prompt, adapter=name, max_new_tokens=10) for name in rows]
            served = [submission.result() for submission in running]
    assert [each.generations[0].token_ids for each in served] == [each.token_ids for each in alone]


def test_an_onnx_adapter_runs_with_and_without_the_library(
    in_place_operator: Path,
    llama_adapters: dict[str, Path],
    operator_library: Path,
    tmp_path: Path,
) -> None:
    from loradeploy.conversion import convert

    file = tmp_path / "large.onnx_adapter"
    convert(llama_adapters["large"], file, bundle=in_place_operator)
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(os.fspath(file))
    active = onnxruntime.RunOptions()
    active.add_active_adapter(adapter)
    batch = feeds(read_manifest(in_place_operator), random_ids(2, 9))
    found = []
    for library in (None, operator_library):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if library is not None:
            options.register_custom_ops_library(os.fspath(library))
        session = onnxruntime.InferenceSession(in_place_operator / "model.onnx", options)
        found.append(session.run(["logits"], batch, active)[0])
        assert np.abs(found[-1] - session.run(["logits"], batch)[0]).max() > 0.05
        with pytest.raises(Exception, match=r"adapter_ids has 7|out of data bounds"):
            session.run(["logits"], batch | {ADAPTER_IDS: np.array([7])})
    assert np.abs(found[0] - found[1]).max() <= tolerance("torch-onnx-tiny")


# -- refusals ------------------------------------------------------------------------------------


def test_a_bundle_without_calls_is_refused(tiny_llama_bundle: Path, operator_library: Path) -> None:
    with pytest.raises(UsageError, match="has no calls of operators: export it again"):
        AdapterSession(tiny_llama_bundle, operator=operator_library)


def test_a_provider_other_than_the_cpus_is_refused(
    in_place_operator: Path, operator_library: Path
) -> None:
    with pytest.raises(UsageError, match="computes on the CPU, and CUDAExecutionProvider"):
        AdapterSession(in_place_operator, ["cuda", "cpu"], operator=operator_library)


def test_a_library_that_is_none_is_refused(in_place_operator: Path, tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="does not exist"):
        AdapterSession(in_place_operator, operator=tmp_path / "lora_add.so")


def test_a_manifest_that_contradicts_the_operator_is_refused(
    in_place_operator: Path, tmp_path: Path
) -> None:
    import json

    values = json.loads((in_place_operator / "loradeploy.json").read_text())
    (tmp_path / "loradeploy.json").write_text(json.dumps(values | {"layout": "rows"}))
    with pytest.raises(BundleError, match="LoraAdd3 is for float32 side inputs in the layout"):
        read_manifest(tmp_path)


def test_options_with_the_library_are_refused_without_the_operator(
    in_place_operator: Path, operator_library: Path, tiny_llama_bundle: Path
) -> None:
    options = onnxruntime.SessionOptions()
    with AdapterSession(in_place_operator, session_options=options, operator=operator_library):
        pass
    with AdapterSession(in_place_operator, session_options=options, operator=operator_library):
        pass
    with pytest.raises(UsageError, match="`session_options` have the operators' library"):
        AdapterSession(in_place_operator, session_options=options)
    with AdapterSession(tiny_llama_bundle, session_options=options):
        pass  # without calls, the library computes nothing
