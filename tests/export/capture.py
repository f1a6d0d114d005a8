"""Sessions that capture their runs, on stubs of the CUDA libraries: which buffers are bound.

    python -m tests.export.capture < JOB.json      # prints JSON

JOB has `bundles` and `adapters`, paths by name; `small` has a lower rank than `large`. Nothing is
computed: device memory can only be written and read by copies, anything else ends the process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

import loradeploy as ld
from loradeploy.runtime.timing import sample_feeds
from tests.runtime.steps import logits_of_steps

ROWS: Final = 2
# Each adapter twice: the second run is captured, later ones are replayed.
STEPS: Final = [None, None, "large", "large", "small", "small", ["small", None], [None, "small"]]


def capture(path: str, adapters: Mapping[str, str]) -> dict[str, Any]:
    """Run `STEPS` in a session on the bundle at `path` and report what it did."""
    try:
        session = ld.AdapterSession(path, ["cuda"], capture_graphs=True)
    except ld.UsageError as problem:
        return {"refused": str(problem)}
    for name, adapter in adapters.items():
        session.load(name, adapter)
    run(session)
    before = addresses(session)
    run(session)
    assert session._replays is not None
    sets = session._replays._slots._sets
    arrays = {str(size): own.values for size, own in sets.items()}
    name = "model.layers.0.self_attn.q_proj.lora_A"
    held = {size: values[name].numpy().copy() for size, values in arrays.items()}
    options = session._session.get_provider_options()["CUDAExecutionProvider"]
    return {
        "enable_cuda_graph": options["enable_cuda_graph"],
        "captured": session.captured,
        "same addresses": addresses(session) == before,
        "memory": sorted({v.device_name() for values in arrays.values() for v in values.values()}),
        "sets": sorted(arrays),
        # How many columns of each slot are not zero: the rank of its adapter.
        "ranks": {
            size: [int(np.abs(slot).max(axis=0).astype(bool).sum()) for slot in values]
            for size, values in held.items()
        },
    }


def run(session: ld.AdapterSession) -> None:
    """Run one step with each of the adapters of `STEPS`."""
    if session.manifest.cache_in_place:
        logits_of_steps(session, np.full((ROWS, len(STEPS)), 5), STEPS)
        return
    fixed = session.manifest.inputs[0].shape[0]
    rows = fixed if isinstance(fixed, int) else ROWS
    feeds = sample_feeds(session, rows, past=127, new=1)
    for adapters in STEPS:
        if rows == ROWS or not isinstance(adapters, list):
            session.run(["logits"], feeds, adapters)


def addresses(session: ld.AdapterSession) -> list[int]:
    """Return the addresses of all buffers that the recordings read or write."""
    assert session._replays is not None
    values = [
        value for own in session._replays._slots._sets.values() for value in own.values.values()
    ]
    for recording in session._replays._recordings.values():
        values += [*recording.feeds.values(), *recording.outputs.values()]
    return [value.data_ptr() for value in values]


if __name__ == "__main__":
    job = json.load(sys.stdin)
    print(json.dumps({n: capture(path, job["adapters"]) for n, path in job["bundles"].items()}))
