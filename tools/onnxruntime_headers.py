"""Fetch the headers of onnxruntime's C and C++ API; its Python wheels only have the library.

    python -m tools.onnxruntime_headers        # prints their directory

The headers are in onnxruntime's releases, and in the npm package of its Unity plugin, which is used
here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from filelock import FileLock

from loradeploy.files import atomic_directory
from tools.inputs.real_models import cache

HEADER: Final = "onnxruntime_cxx_api.h"
_PACKAGE: Final = "com.github.asus4.onnxruntime@0.4.9"  # onnxruntime 1.29
_INSIDE: Final = "ios-arm64_x86_64-simulator/onnxruntime.framework/Headers/"


def headers() -> Path:
    """Return the directory $ONNXRUNTIME_INCLUDE, or a cached one with the package's headers.

    Raises:
        RuntimeError: npm is not installed, or could not get the package.
    """
    given = os.environ.get("ONNXRUNTIME_INCLUDE")
    if given:
        return Path(given)
    place = cache() / f"onnxruntime-headers-{_PACKAGE.rpartition('@')[2]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            with atomic_directory(place, marker=HEADER) as temporary:
                _fetch(temporary)
    return place


def _fetch(place: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is not installed")
    with tempfile.TemporaryDirectory() as directory:
        try:
            done = subprocess.run(
                [npm, "pack", "--silent", "--ignore-scripts", _PACKAGE],
                cwd=directory,
                capture_output=True,
                text=True,
                timeout=180,
                check=True,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as problem:
            raise RuntimeError(f"npm could not get {_PACKAGE}: {problem}") from None
        with tarfile.open(Path(directory) / done.stdout.split()[-1]) as archive:
            for member in archive:
                if _INSIDE in member.name and member.name.endswith(".h"):
                    content = archive.extractfile(member)
                    assert content is not None
                    (place / Path(member.name).name).write_bytes(content.read())


if __name__ == "__main__":
    print(headers())
