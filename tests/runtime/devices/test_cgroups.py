"""Available memory in containers, from the files of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from loradeploy.runtime.decoding.caches.memory import available_memory

MIB = 1 << 20
UNLIMITED = 9223372036854771712  # version 1's value for no limit


def group(root: Path, place: str, version: int, limit: object, used: int, files: int = 0) -> None:
    """Write a control group; `files` of its `used` MiB are page cache."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }[version]
    folder = root / "sys/fs/cgroup" / place.strip("/")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit * MIB if isinstance(limit, int) else limit}\n")
    (folder / names[1]).write_text(f"{used * MIB}\n")
    (folder / "memory.stat").write_text(
        f"anon {(used - files) * MIB}\nfile {files * MIB}\n"
        f"{names[2]}inactive_file {files * MIB - MIB}\n{names[2]}active_file {MIB}\n"
        if files
        else "anon 0\n"
    )


def process(root: Path, *lines: str, available: int = 900) -> Path:
    """Write a machine with `available` MiB and a process in the groups of `lines`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(line + "\n" for line in lines))
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {available << 10} kB\n")
    return root


def test_without_a_limit_the_memory_of_the_machine_counts(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    root = process(tmp_path, "2:memory:/one", "0::/one")
    assert available_memory(root) == 900 * MIB
    group(root, "one", 2, "max", 300)
    group(root, "memory", 1, str(UNLIMITED), 300)
    assert available_memory(root) == 900 * MIB


@pytest.mark.parametrize(("version", "mount"), [(2, ""), (1, "memory")])
def test_the_page_cache_of_a_container_counts_as_free(
    tmp_path: Path, version: int, mount: str
) -> None:
    root = process(tmp_path, "4:memory:/", "0::/")
    group(root, mount, version, 500, 480)
    assert available_memory(root) == 20 * MIB
    group(root, mount, version, 500, 480, files=430)
    assert available_memory(root) == 450 * MIB
    group(root, mount, version, 500, 520)  # temporarily above its limit
    assert available_memory(root) == 0


@pytest.mark.parametrize(("version", "mount"), [(2, ""), (1, "memory")])
def test_the_lowest_limit_of_all_parent_groups_counts(
    tmp_path: Path, version: int, mount: str
) -> None:
    root = process(tmp_path, "4:freezer,memory:/pods/one", "3:cpu:/other", "0::/pods/one")
    group(root, mount, version, 800, 100)
    group(root, f"{mount}/pods/one", version, 600, 100)
    assert available_memory(root) == 500 * MIB
    group(root, f"{mount}/pods", version, 300, 200)
    assert available_memory(root) == 100 * MIB
    group(root, f"{mount}/other", version, 1, 1)
    assert available_memory(root) == 100 * MIB


@pytest.mark.parametrize("path", ["/docker/0f3a", "/../../system.slice", "/"])
def test_a_container_that_sees_only_its_own_group_uses_it(tmp_path: Path, path: str) -> None:
    root = process(tmp_path, f"0::{path}")
    group(root, "", 2, 400, 100)
    assert available_memory(root) == 300 * MIB
