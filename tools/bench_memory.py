"""Measure the resident memory of a session with several adapters (Linux).

    python -m tools.bench_memory BUNDLE ADAPTER… [--operator FILE]

One process opens the bundle, loads the adapters, generates from prompts of 128 to 1024 tokens
without and with an adapter, then with each adapter in turn, and last from as many prompts as
adapters, each with its own. It prints what is resident after each of these, in MiB, and what is
left when the C library has returned what it keeps of freed memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import loradeploy as ld
from loradeploy.runtime.memory import return_freed_memory

_LENGTHS: Final = (128, 512, 1024)
_NEW: Final = 8  # generated tokens


def resident() -> int:
    """Return the resident memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024


def stages(bundle: Path, adapters: Sequence[Path], operator: Path | None) -> Iterator[str]:
    """Yield a description of each stage once it is done."""
    yield "imports"
    session = ld.AdapterSession(bundle, operator=operator)
    yield "open"
    names = [f"adapter {number}" for number in range(len(adapters))]
    for name, path in zip(names, adapters, strict=True):
        session.load(name, path)
        if name == names[0] or name == names[-1]:
            yield f"{name} loaded"
    generator = ld.TextGenerator(session)
    vocabulary = session.limits.vocabulary or 1000

    def generate(tokens: int, rows: Sequence[str | None]) -> None:
        prompts = [
            [(13 * row + at) % vocabulary for at in range(tokens)] for row in range(len(rows))
        ]
        generator.generate(prompts, list(rows), max_new_tokens=_NEW)

    for tokens in _LENGTHS:
        generate(tokens, [None])
        generate(tokens, names[:1])
        yield f"prompt of {tokens}"
    for name in names:
        generate(_LENGTHS[0], [name])
    yield "each adapter in turn"
    for again in ("", ", again"):
        generate(_LENGTHS[0], names)
        yield f"all adapters in a batch{again}"
    return_freed_memory()
    yield "freed memory returned"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER")
    parser.add_argument("--operator", type=Path, help="the operators' library")
    arguments = parser.parse_args()
    print("| after | resident, MiB |\n|---|---|")
    for stage in stages(arguments.bundle, arguments.adapters, arguments.operator):
        print(f"| {stage} | {resident()} |", flush=True)


if __name__ == "__main__":
    main()
