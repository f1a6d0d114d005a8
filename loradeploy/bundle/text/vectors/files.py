"""Read and check the files that sentence-transformers saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.bundle.names import CONFIG_NAME
from loradeploy.bundle.text.vectors.options import EXPECTED_OUTPUTS, longest_text
from loradeploy.bundle.text.vectors.pooling import POOLS
from loradeploy.errors import BundleError, first_line, listed_names, shortened, shown
from loradeploy.files import inside, read_bytes, read_json
from loradeploy.parsing import parse_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

PROMPTS_NAME: Final = "config_sentence_transformers.json"
_ENCODERS: Final = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
ENCODER_NAMES: Final = tuple(f"sentence_{name}_config.json" for name in _ENCODERS)
WEIGHTS_NAME: Final = "model.safetensors"
PACKAGE: Final = "sentence_transformers."
# The modes of pooling by the booleans of older files, in the order in which they are concatenated.
_FLAGS: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# The names of the size of a token's state, the second in older files.
_SIZES: Final = ("embedding_dimension", "word_embedding_dimension")
# The classes of models in `model_type`.
EMBEDDER: Final = "SentenceTransformer"
CROSS_ENCODER: Final = "CrossEncoder"


@dataclass(frozen=True)
class ModelSettings:
    """The contents of config_sentence_transformers.json.

    `kind`: the class of the model. `prompts`: by name; `default_prompt`: the name of one of them.
    `size`: the number of leading values of a vector that are kept; None for all. `activation`: the
    class that converts the logits of a cross-encoder to scores; None if it is not declared.
    """

    kind: str
    prompts: Mapping[str, str]
    default_prompt: str | None
    size: int | None
    activation: str | None


@dataclass(frozen=True)
class Pooling:
    """The settings of a Pooling module.

    `modes`: names of `POOLS`. `include_prompt`: whether the tokens of a prompt are pooled.
    `size`: that of a token's state, None if it is not stated.
    """

    modes: tuple[str, ...]
    include_prompt: bool
    size: int | None


class RecipeReader:
    """Reads files in one directory, and records their names in `files`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: list[str] = []

    def list(self, name: str) -> list[Any]:
        """The JSON list in the file `name`."""
        file = self.directory / name
        try:
            value = parse_json(read_bytes(file, error=BundleError))
        except ValueError as problem:
            raise BundleError(f"{file} is not readable as JSON: {first_line(problem)}") from None
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise BundleError(f"{file} has no list of modules")
        self.files.append(name)
        return value

    def object(self, name: str) -> dict[str, Any]:
        """The JSON object in the file `name`; empty if the file does not exist."""
        file = inside(self.directory, name)
        if not file.is_file():
            return {}
        self.files.append(name)
        return read_json(file, error=BundleError)

    def settings(self) -> ModelSettings:
        """The settings of the model, with their defaults if the file does not exist."""
        values = self.object(PROMPTS_NAME)
        where = self.directory / PROMPTS_NAME
        given = values.get("prompts") or {}
        if not isinstance(given, dict) or not all(
            text is None or isinstance(text, str) for text in given.values()
        ):
            raise BundleError(f"{where}: prompts is not an object of texts")
        prompts = {name: text or "" for name, text in given.items()}
        default = values.get("default_prompt_name")
        if default is not None and not (isinstance(default, str) and default in prompts):
            raise BundleError(
                f"{where}: the default prompt {shown(default)} is not among its prompts"
            )
        size, activation = values.get("truncate_dim"), values.get("activation_fn")
        if size is not None and not (type(size) is int and size > 0):
            raise BundleError(f"{where}: truncate_dim is {shown(size)}")
        return ModelSettings(
            kind=str(values.get("model_type") or EMBEDDER),
            prompts=prompts,
            default_prompt=default,
            size=size,
            activation=None if activation is None else str(activation),
        )

    def encoder(
        self, path: str, *, task: str = "feature-extraction", output: str = "token_embeddings"
    ) -> tuple[int | None, bool]:
        """The maximum number of tokens of a text, and whether texts are lowercased.

        `task`, `output`: the encoder's task and the name of its output.
        """
        values: dict[str, Any] = {}
        for name in ENCODER_NAMES:
            # In a bundle, the encoder has no separate folder: the file is beside modules.json.
            values = self.object(join(path, name)) or (path and self.object(name)) or {}
            if values:
                break
        where = self.directory / path
        for name, expected in (("transformer_task", task), ("module_output_name", output)):
            if values.get(name) not in (None, expected):
                raise BundleError(f"{where}: {name} is {shown(values[name])}, expected {expected}")
        longest = longest_text(values, where, EXPECTED_OUTPUTS[task])
        return longest, values.get("do_lower_case") is True

    def pooling(self, path: str) -> Pooling:
        """The Pooling module in `path`."""
        name = join(path, "config.json")
        values = self.object(name)
        flags = [key for key in values if key.startswith("pooling_mode_") and values[key]]
        if unknown := [key for key in flags if key not in _FLAGS]:
            raise BundleError(
                f"{self.directory / name}: {unknown[0]} is not supported: expected one of"
                f" {', '.join(_FLAGS)}"
            )
        flagged = [mode for key, mode in _FLAGS.items() if values.get(key)]
        given = values.get("pooling_mode")
        if given is None:
            given = flagged or "mean"
        modes = tuple(given) if isinstance(given, list) else (given,)
        if not 0 < len(modes) <= len(POOLS) or not all(isinstance(mode, str) for mode in modes):
            raise BundleError(f"{self.directory / name}: pooling_mode is {shown(given)}")
        if unknown := [mode for mode in modes if mode not in POOLS]:
            raise BundleError(
                f"{self.directory / name}: the pooling {shown(unknown[0])} is not supported:"
                f" expected one of {', '.join(POOLS)}"
            )
        if flagged and set(flagged) != set(modes):
            raise BundleError(
                f"{self.directory / name}: pooling_mode is {listed_names(modes)}, and"
                f" {listed_names(flags)} is {listed_names(flagged)}: keep one of them"
            )
        sizes = {key: values[key] for key in _SIZES if values.get(key) is not None}
        if any(type(size) is not int or size < 1 for size in sizes.values()):
            raise BundleError(f"{self.directory / name}: the size is {shown(sizes)}")
        if len(set(sizes.values())) > 1:
            raise BundleError(f"{self.directory / name}: two sizes, {shown(sizes)}: keep one")
        size = next(iter(sizes.values()), None)
        return Pooling(modes, values.get("include_prompt", True) is not False, size)

    def check_size(self, path: str, size: int) -> None:
        """Raise BundleError if the states of the encoder in `path` do not have the size `size`."""
        for name in dict.fromkeys((join(path, CONFIG_NAME), CONFIG_NAME)):
            file = inside(self.directory, name)
            if not file.is_file():
                continue
            own = read_json(file, error=BundleError).get("hidden_size")
            if type(own) is int and own != size:
                raise BundleError(
                    f"{self.directory}: the Pooling is for states of size {size}, the encoder's"
                    f" hidden_size is {own}: they belong to different models"
                )
            return

    def weights(self, path: str, names: Mapping[str, bool]) -> dict[str, Floats]:
        """The tensors of a module. `names`: the possible tensors, and whether each is required."""
        name = join(path, WEIGHTS_NAME)
        file = inside(self.directory, name)
        if not file.is_file():
            raise BundleError(
                f"{file} does not exist: save the model again with sentence-transformers, weights"
                " in pickles are not read"
            )
        arrays, _ = read_arrays(file, error=BundleError)
        self.files.append(name)
        for tensor, required in names.items():
            if required and tensor not in arrays:
                raise BundleError(f"{file} lacks {tensor}")
        if more := sorted(arrays.keys() - names.keys()):
            raise BundleError(
                f"{file} contains {shortened(more[0])}, which its module does not have"
            )
        sizes = {array.shape[0] for array in arrays.values() if array.ndim}
        ranks = {tensor: 1 if _is_vector(tensor) else 2 for tensor in arrays}
        if len(sizes) != 1 or any(arrays[tensor].ndim != rank for tensor, rank in ranks.items()):
            shapes = {tensor: list(array.shape) for tensor, array in sorted(arrays.items())}
            raise BundleError(f"{file} contains tensors that do not fit: {shown(shapes, 120)}")
        return {tensor: values.astype(np.float32) for tensor, values in arrays.items()}


def _is_vector(tensor: str) -> bool:
    return tensor.endswith("bias") or tensor.startswith("norm.")


def module_of(entry: Mapping[str, Any], file: Path) -> tuple[str, str]:
    """A module's kind and folder. Modules of other packages, which are code, are refused."""
    given, path = entry.get("type"), entry.get("path", "")
    if not isinstance(given, str) or not isinstance(path, str):
        raise BundleError(f"{file}: a module has no type or no path")
    if not given.startswith(PACKAGE):
        raise BundleError(
            f"{file} names the module {shortened(given)}, which is code of its own and is not run:"
            " only sentence-transformers' modules are supported"
        )
    return given.rpartition(".")[2], path


def join(path: str, name: str) -> str:
    """The file `name` in a module's folder `path`, which may be the directory itself."""
    return f"{path.rstrip('/')}/{name}" if path else name
