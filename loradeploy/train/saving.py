"""Write the trained adapter, and do not lose it if its directory cannot be written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from loradeploy.adapter import Adapter, save_adapter
from loradeploy.adapter.files.peft import own_files
from loradeploy.errors import LoraDeployError, TrainingError, kind_and_line
from loradeploy.files import atomic_directory, check_replaceable, check_writable
from loradeploy.names import ADAPTER_CONFIG_NAME
from loradeploy.train.config import TrainConfig
from loradeploy.train.config_file import to_yaml
from loradeploy.train.loop.checkpoints import Checkpoints
from loradeploy.train.reporting.card import CARD_NAME, card
from loradeploy.train.reporting.curve import write_curve
from loradeploy.train.result import TrainResult
from loradeploy.train.tasks.embedding.vectors import Vectors


def check_output(target: Path) -> None:
    """Raise UsageError before the training if the adapter cannot be written."""
    check_replaceable(target, marker=ADAPTER_CONFIG_NAME, own_files=own_files)
    check_writable(target)


def save_run(
    result: TrainResult,
    adapter: Adapter,
    vectors: Vectors | None,
    curve: Sequence[Mapping[str, float]],
    config: TrainConfig,
    data_digest: str,
) -> None:
    """Write the adapter, its loss curve, its settings and its card to `result.adapter`."""
    target = result.adapter
    with atomic_directory(target, marker=ADAPTER_CONFIG_NAME, own_files=own_files) as directory:
        write_adapter(adapter, vectors, directory)
        write_curve(curve, directory)
        (directory / "train.yaml").write_text(to_yaml(config), encoding="utf-8")
        text = card(result, adapter.config, config, data_digest)
        (directory / CARD_NAME).write_text(text, encoding="utf-8")


def write_adapter(adapter: Adapter, vectors: Vectors | None, directory: Path) -> None:
    """Write the adapter's own files, with the settings of an embedder that it brings."""
    save_adapter(adapter, directory)
    if vectors is not None and vectors.own:
        vectors.write(directory)


@contextmanager
def saved_elsewhere(
    target: Path, write: Callable[[Path], None], checkpoints: Checkpoints
) -> Iterator[None]:
    """If `target` cannot be written and there is no checkpoint, save the adapter elsewhere.

    Raises:
        TrainingError: in this case; it names the other directory.
    """
    try:
        yield
    except Exception as problem:
        if checkpoints.newest() is not None:
            raise
        try:
            directory = Path(tempfile.mkdtemp(prefix=f"{target.name}-"))
        except OSError:
            raise problem from None
        try:
            write(directory)
        except Exception:
            shutil.rmtree(directory, ignore_errors=True)
            raise problem from None
        known = isinstance(problem, LoraDeployError)
        reason = problem if known else f"{target} cannot be written: {kind_and_line(problem)}"
        raise TrainingError(
            f"{reason}; the trained adapter is in {directory}: move it to a permanent location"
        ) from problem
