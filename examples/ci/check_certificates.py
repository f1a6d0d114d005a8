"""Check the certificates of the bundles that files belong to: `check_certificates.py FILE…`.

Exit status 0 if every bundle has a valid certificate for its current files, 1 otherwise.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def bundles_of(files: list[str]) -> list[Path]:
    """Return the bundles that contain the files, at any depth."""
    folders = {folder for file in files for folder in Path(file).parents}
    return sorted(folder for folder in folders if (folder / "loradeploy.json").is_file())


def fault(bundle: Path) -> str | None:
    """Return why the bundle has no valid certificate; None if it has one."""
    command = [sys.executable, "-m", "loradeploy", "inspect", str(bundle), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return done.stderr.strip()
    facts = json.loads(done.stdout)
    if facts["parity"] == "passed":
        return None
    return f"{bundle}: parity {facts['parity']}: {facts['parity_note']}"


def main(files: list[str]) -> int:
    """Print the fault of every bundle without a valid certificate."""
    faults = [found for found in map(fault, bundles_of(files)) if found is not None]
    print(*faults, sep="\n", end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
