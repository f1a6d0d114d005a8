"""Run a graph with onnxruntime on the CPU, for trials and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.proof.provider import CPU as CPU
from loradeploy.bundle.proof.provider import EXACT_INTEGERS
from loradeploy.errors import first_line

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

Outputs = dict[str, "NDArray[Any]"]
_FATAL: Final = 4  # onnxruntime's log severity: messages go into the error


class NotRunError(Exception):
    """onnxruntime cannot open or run a graph. `lacking`: because it lacks an operator."""

    def __init__(self, reason: str, *, lacking: bool) -> None:
        super().__init__(reason)
        self.lacking = lacking


def trial_options(*, packed: bool = False) -> onnxruntime.SessionOptions:
    """Options for a session that runs a few times: silent, with little memory.

    `packed`: the weights are integers of few bits. onnxruntime may copy them then, because it
    would otherwise compute all of them in fp32 at each run, in ten times the time.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry(EXACT_INTEGERS, "1")
    if not packed:  # prepacking would copy the weights
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def open_graph(
    file: Path, *, packed: bool = False, optimized: bool = True
) -> onnxruntime.InferenceSession:
    """Open the graph in `file` on the CPU, with default optimization or none.

    `packed`: as in `trial_options`.

    Raises:
        NotRunError: onnxruntime does not open it.
    """
    import onnxruntime

    options = trial_options(packed=packed)
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(file, options, providers=[CPU])
    except Exception as problem:  # onnxruntime's exceptions have no other common base
        raise _not_run(problem) from None


def run_graph(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, Any], names: Sequence[str]
) -> Outputs:
    """Run the session and return the outputs `names`.

    Raises:
        NotRunError: onnxruntime does not run it.
    """
    try:
        return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))
    except Exception as problem:
        raise _not_run(problem) from None


def run_graphs(
    sessions: Sequence[onnxruntime.InferenceSession],
    feeds: Mapping[str, Any],
    names: Sequence[str],
) -> Outputs:
    """Run the sessions of a graph in several files and return the outputs `names`.

    Each session is fed the inputs that it has.

    Raises:
        NotRunError: onnxruntime does not run one of them.
    """
    if len(sessions) == 1:
        return run_graph(sessions[0], feeds, names)
    found: Outputs = {}
    for session in sessions:
        taken = {n.name for n in (*session.get_inputs(), *session.get_overridable_initializers())}
        own = [node.name for node in session.get_outputs() if node.name in names]
        given = {name: values for name, values in feeds.items() if name in taken}
        found |= run_graph(session, given, own)
    return {name: found[name] for name in names}


def _not_run(problem: Exception) -> NotRunError:
    line = first_line(problem)
    lacking = type(problem).__name__ == "NotImplemented" or "not a registered function" in line
    return NotRunError(line, lacking=lacking)
