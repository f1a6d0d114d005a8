"""Complete the requested form of a graph with the settings of its bundle or of its target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loradeploy.bundle.graph_form import DEFAULT_PRECISION, inherit
from loradeploy.bundle.run_target import check_runs, choice_of

if TYPE_CHECKING:
    from loradeploy.export.read.files.source import Source


def completed(requested: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The options of the form, by their names in `loradeploy.export`, completed for `source`.

    Those that are not given are taken from the bundle that is exported again, or from the target.
    Others are None, and are decided when the graph is known.

    Raises:
        UsageError: options that the bundle or the target does not support.
    """
    form = dict(requested)
    if source.manifest is not None:
        form = inherit(form, source.manifest)
    elif source.graph is None and form["precision"] is None:
        form["precision"] = choice_of(form["target"], "precision", DEFAULT_PRECISION)
    if source.graph is None:  # before it is traced
        floats = "float16" if form["precision"] == "fp16" else "float32"
        check_runs(form["target"], {**form, "cache": floats})
    if form["required_inputs"] is None and not form["merge"]:
        form["required_inputs"] = choice_of(form["target"], "required_inputs", DEFAULT_PRECISION)
    return form
