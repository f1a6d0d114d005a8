"""Write `loradeploy/adapter/modules/renamings.json` from the installed transformers.

    python -m tools.renamings

The file has transformers' own renamings of module paths of older checkpoints and adapters: by class
or model type, a list of [patterns, replacements] in order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import loradeploy.adapter.modules.renamings

FILE: Final = Path(loradeploy.adapter.modules.renamings.__file__).with_suffix(".json")

# Renamings that depend on other keys or on values, for layers that do not support LoRA.
LEFT_OUT: Final = ("GroupWeightRename", "Inkling2IndexOffsetWeightRename")


def table() -> dict[str, list[list[list[str]]]]:
    """Return the table of the installed transformers."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    mapping: dict[str, list[Any]] = conversion_mapping._build_checkpoint_conversion_mapping()
    found = {}
    for name, transforms in sorted(mapping.items()):
        renamings = [
            [list(transform.source_patterns), list(transform.target_patterns)]
            for transform in transforms
            if isinstance(transform, WeightRenaming) and type(transform).__name__ not in LEFT_OUT
        ]
        # An entry without renamings is kept: it overrides that of a parent class.
        found[name] = renamings
    return found


def main() -> None:
    """Write the file."""
    lines = [f"{json.dumps(name)}: {json.dumps(rules)}" for name, rules in table().items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
