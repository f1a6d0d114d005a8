"""The model configuration in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loradeploy.bundle.names import CONFIG_NAME
from loradeploy.errors import BundleError, LoraDeployError
from loradeploy.files import read_json


def model_config(directory: Path, *, error: type[LoraDeployError] = BundleError) -> dict[str, Any]:
    """The contents of config.json in `directory`; empty if it does not exist.

    Raises:
        `error`: it cannot be read, or is not an object.
    """
    file = directory / CONFIG_NAME
    return read_json(file, error=error) if file.is_file() else {}
