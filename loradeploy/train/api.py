"""`loradeploy.train`: train an adapter for a base model on data."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from loradeploy.paths import takes_paths

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Unpack

    from loradeploy.train.config import TrainConfig
    from loradeploy.train.flags import TrainFlags
    from loradeploy.train.result import TrainResult


@takes_paths("model", "data", "output")
def train(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    config: TrainConfig | str | os.PathLike[str] | Mapping[str, Any] | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    **flags: Unpack[TrainFlags],
) -> TrainResult:
    """Train an adapter for `model` on `data` and write it to `output`, a PEFT directory.

    Args:
        model: a Hugging Face directory or id.
        data: a file, a folder or a dataset; docs/training.md describes the formats, and the columns
            of each task.
        output: the directory for the adapter, `loss.csv`, `loss.png`, and `train.yaml`, the
            complete settings.
        config: the settings as a `TrainConfig`, a YAML file, or a mapping with its names.
        resume: continue from the newest checkpoint in `OUTPUT-checkpoints` (see `save_steps`),
            which a completed run removes. The result is the same, bit for bit, as without the
            interruption.
        trust_remote_code: run the Python files that the model's config names. They can do anything.
            By default, such a model is refused.
        flags: individual settings, which override those of `config`.

    Raises:
        UsageError: a setting that does not exist or is out of range, an output that cannot be
            written, nothing to resume, or checkpoints of another run.
        ModelError: the model is missing or malformed, or does not fit the task.
        DataError: the data is missing, empty, or has a line (named) that cannot be used.
        TrainingError: the loss or a gradient is no longer finite, or memory or disk ran out.
        TrainingInterruptedError: a signal stopped the run, after a step and with a checkpoint.
        MissingDependencyError: the extra `train` is not installed.
    """
    from loradeploy.lora.base.loading import custom_code
    from loradeploy.train.config_file import read_config
    from loradeploy.train.data.sources import Source, check_exists

    settings = read_config(config, flags)
    check_exists(Source(data))
    try:
        from loradeploy.lora.quiet import quiet

        with quiet():  # accelerate imports bitsandbytes, which prints messages
            from loradeploy.train.job import run
    except ModuleNotFoundError as missing:
        from loradeploy.errors import MissingDependencyError

        raise MissingDependencyError(
            f"training needs {missing.name}: pip install 'loradeploy[train]'"
        ) from None
    with custom_code(trust_remote_code):
        return run(model, data, output, settings, resume=resume)
