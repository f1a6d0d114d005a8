"""The model card of an adapter: README.md in its directory, which the Hugging Face hub shows."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from loradeploy.printable import as_markdown, printable

if TYPE_CHECKING:
    from loradeploy.adapter import AdapterConfig
    from loradeploy.train.config import TrainConfig
    from loradeploy.train.result import TrainResult

CARD_NAME: Final = "README.md"
_LIBRARIES: Final = ("loradeploy", "torch", "transformers", "accelerate")


def card(
    result: TrainResult, adapter: AdapterConfig, settings: TrainConfig, data_digest: str
) -> str:
    """The card of a run's adapter: Markdown with the hub's front matter.

    `data_digest` identifies the tokenized examples.
    """
    base = printable(str(adapter.base_model_name_or_path))
    front = {
        "base_model": base,
        "library_name": "peft",
        "tags": ["loradeploy", "lora", settings.task],
    }
    facts: list[tuple[str, Any]] = [
        ("base model", as_markdown(base)),
        ("base digest", f"`{result.base_digest}`"),
        ("adapter digest", f"`{result.digest}`"),
        ("data", f"{result.examples:,} examples, digest `{data_digest}`"),
        ("method", adapter.method),
        ("rank, alpha", f"{adapter.r}, {adapter.lora_alpha:g}"),
        ("trained parameters", f"{result.parameters:,}"),
        ("steps, tokens", f"{result.steps:,}, {result.tokens:,}"),
        (f"loss on the {result.evaluated_on} examples", _change("loss", result)),
    ]
    if result.accuracy_before is not None:
        facts.append(("accuracy on them", _change("accuracy", result)))
    made = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    facts.append(("made with", made))
    lines = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),
        "---",
        "",
        f"# A LoRA adapter for {as_markdown(base)}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts),
        "",
        "All settings are in `train.yaml`, the loss of every step in `loss.csv`.",
        "",
        "Deployed on ONNX Runtime, swapped per call and per row of a batch:",
        "",
        "    loradeploy export --model BASE --output bundle --adapter name=THIS_DIRECTORY",
        '    loradeploy run bundle "…" --adapter name',
        "",
        "In PyTorch: `peft.PeftModel.from_pretrained(base, THIS_DIRECTORY)`.",
        "",
    ]
    return "\n".join(lines)


def _change(name: str, result: TrainResult) -> str:
    before, after = (getattr(result, f"{name}_{when}") for when in ("before", "after"))
    return f"{before:.4f} → {after:.4f}"
