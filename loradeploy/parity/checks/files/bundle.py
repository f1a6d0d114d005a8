"""Whether the files of a bundle are those that an export writes of the model and the adapters.

The files of the base are written again as an export writes them, and compared by their meaning
(texts.py, meanings.py); the others are compared with the graph, the base and the adapters in the
bundle (manifest.py, weights.py, adapters.py, required.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loradeploy.bundle.model_config import model_config, rotary_limit
from loradeploy.bundle.names import CONFIG_NAME
from loradeploy.disk import scratch_directory
from loradeploy.errors import LoraDeployError, ModelError, first_line
from loradeploy.export.building.config import with_positions
from loradeploy.export.files.assets import AssetSources, write_assets
from loradeploy.files import inside, write_json
from loradeploy.lora.quiet import quiet_loradeploy
from loradeploy.parity.checks.files.adapters import differing_adapters
from loradeploy.parity.checks.files.graphs import read_graphs
from loradeploy.parity.checks.files.manifest import Facts, differing_manifest
from loradeploy.parity.checks.files.meanings import MEANINGS
from loradeploy.parity.checks.files.pair import Pair
from loradeploy.parity.checks.files.required import differing_required
from loradeploy.parity.checks.files.texts import TEXTS
from loradeploy.parity.checks.files.weights import differing_values, differing_weights
from loradeploy.parity.report.results import Result

if TYPE_CHECKING:
    import torch

    from loradeploy.parity.context import CheckContext

BACKEND: Final = "files"
_TITLE: Final = "files of the bundle"
_BESIDE: Final = "put the model's files beside the ONNX file and export again"


def differing_files(context: CheckContext, model: torch.nn.Module) -> list[Result]:
    """Return a failed result for each meaning in which the bundle's files are not `model`'s.

    `model`: the base in PyTorch, before it takes quantized weights. A bundle of an ONNX file has
    the files beside it. Those that it lacks, and without which the runtime refuses a text, are not
    a difference.
    """
    try:
        graphs = read_graphs(context)
    except LoraDeployError as problem:
        return [failed("graph", first_line(problem))]
    facts = Facts(context, graphs, model)
    found = [
        *differing_manifest(facts),
        *differing_values(facts),
        *differing_weights(facts),
        *differing_adapters(context),
        *differing_required(context, graphs),  # last: it changes the graph
    ]
    with scratch_directory() as expected:
        try:
            with quiet_loradeploy():
                write_expected(context, expected)
        except LoraDeployError as problem:
            if context.manifest.traced:  # an export wrote them before
                message = f"they cannot be compared with those of {context.model}: {problem}"
                found.append(("all", message))
        else:
            found += _differences(context, expected)
    return [failed(aspect, message) for aspect, message in found or _missing(context)]


def what_is_compared() -> str:
    """A note for the report: what `differing_files` compares, even if nothing differs."""
    aspects = ("manifest", "weights", "adapters", "required inputs", *TEXTS, *MEANINGS)
    return f"also compared, where the bundle has them: {', '.join(aspects)}"


def _missing(context: CheckContext) -> Iterator[tuple[str, str]]:
    """The files that the manifest lists and the bundle lacks, if no aspect names them."""
    for name in context.manifest.files:
        if not inside(context.bundle, name).is_file():
            yield "files", f"{name} is missing: export again"


def failed(aspect: str, message: str) -> Result:
    """The result for an aspect of the bundle's files that is not the model's."""
    return Result(BACKEND, _TITLE, None, None, "failed", message, aspect=aspect)


def write_expected(context: CheckContext, directory: Path) -> None:
    """Write the files of the base, or of the merged adapter, as an export writes them."""
    config = model_config(context.model, error=ModelError)
    merged = {a.name: a.path for a in context.adapters} if context.merged else {}
    own = model_config(context.bundle)
    size = own.get("vocab_size")
    changed = merged and type(size) is int and size != config.get("vocab_size")
    if changed:
        config["vocab_size"] = size
    if (limit := rotary_limit(config)) is not None:
        config = with_positions(config, limit)
    sources = AssetSources(context.model, (context.model,), merged, size if changed else None)
    _, config = write_assets(directory, context.manifest, config, sources)
    write_json(directory / CONFIG_NAME, config)


def _differences(context: CheckContext, expected: Path) -> Iterator[tuple[str, str]]:
    pair = Pair(context.bundle, expected, context)
    for aspect, compare in {**TEXTS, **MEANINGS}.items():
        try:
            message = compare(pair)
        except LoraDeployError as problem:
            message = first_line(problem)
        if message is not None:
            again = "export again" if pair.traced else _BESIDE
            yield aspect, f"{message}: {again}, or check with the model that it was made from"
