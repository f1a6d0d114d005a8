"""`python -m tools.cuda_placement`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from loradeploy.errors import LoraDeployError
from tools.cuda_placement.placement import CPU, CUDA, Placement, placements

_NOTE = "Placement only, on stub libraries: nothing was computed, numbers and times are not known."


def main() -> None:
    parser = argparse.ArgumentParser(description="Where CUDA would run a bundle's nodes.")
    parser.add_argument("bundle", type=Path, help="a bundle, or an ONNX file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    try:
        found = placements(arguments.bundle)
    except LoraDeployError as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    if arguments.json:
        print(
            json.dumps({"numbers": _NOTE, "graphs": [each.to_json() for each in found]}, indent=2)
        )
        return
    print(_NOTE)
    for each in found:
        print("\n".join(described(each)))


def described(found: Placement) -> list[str]:
    """Return the lines about one graph."""
    counts = found.counts
    where = f"{counts.get(CUDA, 0)} nodes on CUDA, {counts.get(CPU, 0)} on the CPU"
    lines = ["", f"{found.graph}: {where}, {found.copies} copies"]
    lines += [f"  CPU  {row.count:4d} {row.op}: {row.why}" for row in found.cpu_nodes]
    taken = "accepted" if found.refusal is None else f"refused: {found.refusal}"
    return [*lines, f"  enable_cuda_graph=1 is {taken}"]


if __name__ == "__main__":
    main()
