"""Write renamings.json and base_models.json in loradeploy/adapter/modules from transformers.

    python -m tools.renamings

The first has transformers' own renamings of module paths of older checkpoints and adapters: by
class or model type, a list of [patterns, replacements] in order. The second has the base model of
each model type whose class has such renamings, which a graph's config.json does not show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import loradeploy.adapter.modules.renamings

BASES: Final = Path(loradeploy.adapter.modules.renamings.__file__).with_name("base_models.json")
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


def base_models() -> dict[str, list[str]]:
    """Return [base model's class, prefix of its paths] by model type, if the class has renamings.

    Types whose prefix is `model` are left out: their renamings are those of the whole model.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    renamed = {name for name, rules in table().items() if rules}
    found = {}
    for model_type, names in sorted(MODEL_MAPPING_NAMES.items()):
        for name in names if isinstance(names, list | tuple) else [names]:
            prefix = getattr(transformers, name).base_model_prefix if name in renamed else ""
            if prefix not in ("", "model"):
                found[model_type] = [name, prefix]
    return found


def main() -> None:
    """Write the files."""
    for file, rows in ((FILE, table()), (BASES, base_models())):
        lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
