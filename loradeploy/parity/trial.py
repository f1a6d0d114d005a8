"""A bundle opened on a provider in a process of its own, before it is opened in this one.

A provider with a wrong kernel may end its process, and a check that has ended proves nothing and
reports nothing. So a provider that is not known to be right first opens the bundle in a child,
where a session runs the base and a random adapter on it (`runtime.devices.effect`). A child that
a signal ended, or that does not come to its end, is a failure with a name.

    python -m loradeploy.parity.trial    reads {"bundle": PLACE, "providers": [[NAME, {…}], …],
                                              "captured": false}
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loradeploy.runtime.devices.providers import Resolved

# Seconds that the trial may take. A few short runs take less on any device that is of use for the
# whole check, which is hundreds of such runs.
LONGEST: Final = 1800
# Windows' exit codes of a process that an exception ended begin here.
_EXCEPTIONS: Final = 0xC0000000


def crash_of(bundle: Path, providers: Sequence[Resolved], *, captured: bool = False) -> str | None:
    """How a process ended that ran `bundle` on `providers`; None where it came to its end.

    `captured`: whether its runs were to be captured.

    One that hangs is ended.

    Whether the numbers are right is not asked here: that is what the check measures.
    """
    request = {"bundle": os.fspath(bundle), "providers": providers, "captured": captured}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "loradeploy.parity.trial"],
            input=json.dumps(request, default=str),
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=LONGEST,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except subprocess.TimeoutExpired:
        return f"it had not ended after {LONGEST} seconds"
    if done.returncode < 0:
        number = -done.returncode
        known = {one.value: one.name for one in signal.Signals}
        return f"it ended its process ({known.get(number, f'signal {number}')})"
    if done.returncode >= _EXCEPTIONS:
        return f"it ended its process (exit status {done.returncode:#x})"
    return None


def main() -> None:
    """Open the bundle that stdin names, and run it."""
    from loradeploy.errors import LoraDeployError
    from loradeploy.runtime.session import AdapterSession

    request = json.load(sys.stdin)
    providers = [(name, options) for name, options in request["providers"]]
    try:
        AdapterSession(request["bundle"], providers, capture_graphs=request["captured"]).close()
    except LoraDeployError:
        sys.exit(1)  # the check itself meets it again, and reports it


if __name__ == "__main__":
    main()
