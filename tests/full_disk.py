"""What the commands do on a disk that fills up, in a process that has a disk of its own.

    unshare --mount python -m tests.full_disk PLACE REQUESTS

Each request is a line of the command, its output, and the shares of what it takes that are free.
The results are JSON on stdout: how each ended, and what was left of what stood there before.
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
    """The exit status of a command, and what it says on stderr."""
    said = io.StringIO()
    code = 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(line)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, said.getvalue()


def contents(place: Path) -> dict[str, str]:
    """The digests of all files below `place`, but for the one that fills the disk."""
    files = [path for path in sorted(place.rglob("*")) if path.is_file() and path.name != "full"]
    return {
        path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def free(place: Path) -> int:
    """The bytes that can be written."""
    told = os.statvfs(place)
    return told.f_bavail * told.f_bsize


def fill(disk: Path, left: int) -> None:
    """Leave `left` bytes free."""
    with open(disk / "full", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free(disk) - left)


def answer(disk: Path, line: list[str], shares: list[float], before: bool) -> list[Any]:
    """How the command ends where a share of what it takes is free."""
    whole = free(disk)
    status, said = run(line)
    if status:
        raise RuntimeError(said)
    taken = whole - free(disk)
    results = []
    for share in shares:
        if not before:
            for path in disk.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        old = contents(disk)
        fill(disk, int(share * taken))
        status, said = run(line)
        (disk / "full").unlink()
        left = sorted(path.name for path in disk.iterdir())
        results.append(
            {"status": status, "said": said, "kept": contents(disk) == old, "left": left}
        )
    return results


if __name__ == "__main__":
    here = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", here], check=True)
    told = [
        answer(here, request["line"], request["shares"], request["before"])
        for request in json.loads(sys.argv[2])
    ]
    print(json.dumps(told))
