"""Resource limits of this process's container, from control groups of version 1 or 2."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Final

_MOUNT: Final = "sys/fs/cgroup"
# Files with the processor time and its period; "max" or -1 if there is no limit.
_CORES: Final = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
# Files with the limit and the usage, and the names of file pages in memory.stat.
_MEMORY: Final = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def cores(root: Path) -> float | None:
    """The number of processors that this process may use; None without a limit.

    `root`: the root directory of the machine's files.
    """
    found = []
    for group in _groups(root, "cpu"):
        for files in _CORES:
            try:
                words = " ".join((group / file).read_text(encoding="ascii") for file in files)
                quota, period = map(int, words.split())
            except (OSError, ValueError):  # no such file, or "max"
                continue
            if quota > 0 and period > 0:
                found.append(quota / period)
    return min(found, default=None)


def free_memory(root: Path) -> int | None:
    """The bytes that this process can still allocate; None without a limit. `root`: see `cores`.

    Pages of files, such as a graph's weights, are counted as used, but the system reclaims them if
    memory is needed.
    """
    found = []
    for group in _groups(root, "memory"):
        for limit, used, cached in _MEMORY:
            try:
                most = int((group / limit).read_text(encoding="ascii"))
                taken = int((group / used).read_text(encoding="ascii"))
                found.append(max(0, min(most, most - taken + _statistics(group, cached))))
            except (OSError, ValueError):  # no such file, or "max"
                continue
    return min(found, default=None)


def _statistics(group: Path, names: tuple[str, ...]) -> int:
    """The sum of the entries `names` of memory.stat; 0 if there are none."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return 0
    words = [line.split() for line in lines]
    return sum(int(pair[1]) for pair in words if len(pair) == 2 and pair[0] in names)


def _groups(root: Path, controller: str) -> list[Path]:
    """The directories of this process's control group and its parents.

    A container sees its own group as the root, under whatever name proc has for it.
    """
    own = {"": "", controller: ""}  # by hierarchy; version 2 has one, without a name
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    for line in lines:
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        own.update({name: path for name in controllers.split(",") if name in own})
    groups = []
    for name, path in own.items():
        inside = PurePosixPath(path.strip("/"))
        if ".." in inside.parts:  # outside what this container sees
            inside = PurePosixPath()
        groups += [root / _MOUNT / name / place for place in (inside, *inside.parents)]
    return groups
