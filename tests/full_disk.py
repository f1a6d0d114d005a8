"""Run commands on a disk that fills up: a small tmpfs in the mount namespace of this process.

    unshare --mount python -m tests.full_disk PLACE REQUESTS

Each request has a command line (`line`), the fractions of the space it needs that are free in each
run (`shares`), and whether the output of an earlier run exists (`before`). The results are JSON on
stdout: exit status, stderr, whether existing files were kept, and the names that remain.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from loradeploy.cli.main import main

_SIZE = 64 << 20


def run(line: list[str]) -> tuple[int, str]:
    """Return the exit status of a command and its stderr."""
    stderr = io.StringIO()
    code = 0
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(line)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, stderr.getvalue()


def contents(place: Path) -> dict[str, str]:
    """Return the digests of all files below `place`, except the one that fills the disk."""
    files = [path for path in sorted(place.rglob("*")) if path.is_file() and path.name != "full"]
    return {
        path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def free(place: Path) -> int:
    """Return the number of bytes that can still be written."""
    status = os.statvfs(place)
    return status.f_bavail * status.f_bsize


def fill(disk: Path, left: int) -> None:
    """Fill the disk, leaving `left` bytes free."""
    with open(disk / "full", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free(disk) - left)


def answer(disk: Path, line: list[str], shares: list[float], before: bool) -> list[Any]:
    """Run the command with each of `shares` of the space it needs free; return the results."""
    whole = free(disk)
    status, stderr = run(line)
    if status:
        raise RuntimeError(stderr)
    taken = whole - free(disk)
    results = []
    for share in shares:
        if not before:
            for path in disk.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        old = contents(disk)
        fill(disk, int(share * taken))
        status, stderr = run(line)
        (disk / "full").unlink()
        left = sorted(path.name for path in disk.iterdir())
        results.append(
            {"status": status, "stderr": stderr, "kept": contents(disk) == old, "left": left}
        )
    return results


if __name__ == "__main__":
    here = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", here], check=True)
    results = [
        answer(here, request["line"], request["shares"], request["before"])
        for request in json.loads(sys.argv[2])
    ]
    print(json.dumps(results))
