"""Opens a bundle on a provider in a child process before the check opens it in this one.

A provider with a faulty kernel may crash its process, and a check that crashed reports nothing. A
provider that is not known to be reliable therefore first opens the bundle in a child process,
where a session runs the base and a random adapter on it (`runtime.devices.effect`). If the child
is terminated by a signal or hangs, the check reports a failure of that provider.

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

# Time limit of the trial, in seconds. A device on which a few short runs take longer is of no use
# for the whole check, which makes hundreds of them.
LONGEST: Final = 1800
# On Windows, a process that an exception terminated has an exit code from here on.
_EXCEPTIONS: Final = 0xC0000000


def crash_of(bundle: Path, providers: Sequence[Resolved], *, captured: bool = False) -> str | None:
    """Run `bundle` on `providers` in a child process; return how it crashed, or None.

    `captured`: whether the runs are to be captured. A child that hangs is killed.

    The numbers are not compared here: the check itself does that.
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
    """Open the bundle that the JSON object on stdin names, and run it."""
    from loradeploy.errors import LoraDeployError
    from loradeploy.runtime.session import AdapterSession

    request = json.load(sys.stdin)
    providers = [(name, options) for name, options in request["providers"]]
    try:
        AdapterSession(
            request["bundle"], providers, capture_graphs=request["captured"], map_weights=True
        ).close()
    except LoraDeployError:
        sys.exit(1)  # the check itself raises the same error again, and reports it


if __name__ == "__main__":
    main()
