"""The model's configuration that lies in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loradeploy.bundle.names import CONFIG_NAME
from loradeploy.errors import BundleError, LoraDeployError
from loradeploy.files import read_json


def model_config(directory: Path, *, error: type[LoraDeployError] = BundleError) -> dict[str, Any]:
    """The object in the config.json of `directory`; empty where there is none.

    Raises:
        `error`: it cannot be read, or is no object.
    """
    file = directory / CONFIG_NAME
    return read_json(file, error=error) if file.is_file() else {}
