"""How an encoder's states become a text's vector: the modules that sentence-transformers saves.

modules.json                       the modules in their order, each with its type and folder
sentence_bert_config.json          in the encoder's folder: the longest text, and its letter case
config_sentence_transformers.json  prompts by name, and which one is the default
1_Pooling/config.json              what is taken of the tokens' states
2_Dense/config.json                a layer on the pooled vector, its weights in model.safetensors

They lie beside the base, and beside an adapter that sentence-transformers trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.digest import file_digest
from loradeploy.adapter.tensors import read_arrays
from loradeploy.bundle.text.pooling import POOLS
from loradeploy.errors import BundleError, first_line, listed_names, shortened, shown
from loradeploy.files import inside, read_bytes, read_json, write_json
from loradeploy.parsing import parse_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    # Of vectors [batch, size] to vectors [batch, another size].
    Step = Callable[[Floats], Floats]

MODULES_NAME: Final = "modules.json"
PROMPTS_NAME: Final = "config_sentence_transformers.json"
_ENCODERS: Final = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
ENCODER_NAMES: Final = tuple(f"sentence_{name}_config.json" for name in _ENCODERS)
WEIGHTS_NAME: Final = "model.safetensors"
_PACKAGE: Final = "sentence_transformers."
_VECTOR: Final = "sentence_embedding"
_LEAST: Final = 1e-12  # a vector of zeros stays one
# The modes of pooling, by the booleans of older files, in the order in which they are put together.
_FLAGS: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, eq=False)
class SentenceRecipe:
    """From a text to its vector.

    `pooling`: modes by sentence-transformers' names; their vectors are put side by side.
    `include_prompt`: whether a prompt's tokens are pooled too.
    `steps`: what is done to the pooled vectors, in this order.
    `max_length`: tokens of the longest text, None where the tokenizer's limit is it.
    `files`: what it was read from, relative to its directory; `digest`: of these.
    """

    pooling: tuple[str, ...]
    steps: tuple[Step, ...]
    include_prompt: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_length: int | None = None
    lowercase: bool = False
    files: tuple[str, ...] = ()
    digest: str = ""

    def same(self, other: SentenceRecipe) -> bool:
        """Whether both were read from the same files."""
        return self is other or self.digest == other.digest

    def vectors(
        self, states: NDArray[Any], mask: NDArray[np.int64], prompt_tokens: int = 0
    ) -> Floats:
        """The vectors [batch, size] of states [batch, sequence, hidden], padded on the right.

        `mask`: int64 [batch, sequence]. `prompt_tokens`: how many tokens at the beginning are a
        prompt's.
        """
        pooled_over = mask
        if prompt_tokens and not self.include_prompt:
            pooled_over = mask.copy()
            pooled_over[:, :prompt_tokens] = 0
        values = states.astype(np.float32)
        vectors = np.concatenate([POOLS[m](values, pooled_over) for m in self.pooling], axis=1)
        return self.scaled(vectors)

    @property
    def is_usual(self) -> bool:
        """Whether texts become the vectors of `default_recipe`, up to their length."""
        plain = self.pooling == ("mean",) and self.only_scales
        return plain and not self.lowercase and self.default_prompt is None

    @property
    def only_scales(self) -> bool:
        """Whether nothing but normalization is done to what is pooled."""
        return self.include_prompt and all(step is _normalize for step in self.steps)

    def scaled(self, pooled: NDArray[Any]) -> Floats:
        """What the steps make of pooled vectors [batch, size]."""
        vectors = pooled.astype(np.float32)
        for step in self.steps:
            vectors = step(vectors)
        return vectors.astype(np.float32)


def read_recipe(directory: Path) -> SentenceRecipe | None:
    """The recipe in `directory`; None where it holds no modules.json.

    Raises:
        BundleError: a file is broken, or a module is of a kind that is not computed here.
    """
    file = directory / MODULES_NAME
    if not file.is_file():
        return None
    reader = _Reader(directory)
    entries = reader.list(MODULES_NAME)
    encoder = _module(entries[0], file) if entries else None
    if encoder is None or encoder[0] != "Transformer":
        raise BundleError(f"{file}: the first module is no Transformer, which alone is supported")
    model_type, prompts, default = reader.prompts()
    if model_type != "SentenceTransformer":
        raise BundleError(
            f"{directory / PROMPTS_NAME} is a {shortened(model_type)}'s, which is not supported: a"
            " SentenceTransformer gives one vector a text"
        )
    max_length, lowercase = reader.encoder(encoder[1])
    pooling: tuple[str, ...] = ()
    include_prompt = True
    steps: list[Step] = []
    for entry in entries[1:]:
        kind, path = _module(entry, file)
        if kind == "Pooling" and not pooling:
            pooling, include_prompt = reader.pooling(path)
        elif kind == "Dropout":
            continue
        elif kind in _STEPS and pooling:
            steps.append(_STEPS[kind](reader, path))
        else:
            where = "" if pooling else " before the Pooling"
            known = ", ".join(("Transformer", "Pooling", "Dropout", *_STEPS))
            raise BundleError(
                f"{file} names a module {shortened(kind)}{where} ({shortened(path)}), which is not"
                f" supported; there are {known}"
            )
    if not pooling:
        raise BundleError(f"{file} names no Pooling: nothing specifies what a text's vector is")
    return SentenceRecipe(
        pooling=pooling,
        steps=tuple(steps),
        include_prompt=include_prompt,
        prompts=prompts,
        default_prompt=default,
        max_length=max_length,
        lowercase=lowercase,
        files=tuple(reader.files),
        digest=" ".join(file_digest(directory / name) for name in sorted(reader.files)),
    )


def recipe_directory(directory: Path) -> Path | None:
    """Where the recipe of the model or adapter in `directory` is; None where there is none.

    There, or one level up where `directory` is the folder of its encoder or of its ONNX graphs.
    """
    if (directory / MODULES_NAME).is_file():
        return directory
    above = directory.resolve().parent
    if not (above / MODULES_NAME).is_file():
        return None
    name = directory.resolve().name
    modules = _Reader(above).list(MODULES_NAME)
    encoder = modules[0].get("path") if modules else None
    return above if name in ("onnx", encoder) else None


def default_recipe() -> SentenceRecipe:
    """Where nothing tells: the mean of the tokens' states at length 1, as most are trained."""
    return SentenceRecipe(("mean",), (_normalize,))


def write_default(directory: Path) -> None:
    """Write the files of `default_recipe`, for what was trained by it on a base with another."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"{_PACKAGE}models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    write_json(directory / MODULES_NAME, entries)
    pooling = directory / "1_Pooling"
    pooling.mkdir(exist_ok=True)
    write_json(pooling / "config.json", {"pooling_mode": "mean"})


def flat_modules(directory: Path) -> list[Any]:
    """The entries of modules.json with the encoder in the directory itself, as a bundle has it."""
    first, *rest = _Reader(directory).list(MODULES_NAME)
    return [{**first, "path": ""}, *rest]


class _Reader:
    """Reads the files below one directory, and notes which."""

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
            raise BundleError(f"{file} holds no list of modules")
        self.files.append(name)
        return value

    def object(self, name: str) -> dict[str, Any]:
        """The JSON object in the file `name`, empty where there is none."""
        file = inside(self.directory, name)
        if not file.is_file():
            return {}
        self.files.append(name)
        return read_json(file, error=BundleError)

    def prompts(self) -> tuple[str, dict[str, str], str | None]:
        """What kind of model it is, the prompts, and the name of the default one."""
        values = self.object(PROMPTS_NAME)
        where = self.directory / PROMPTS_NAME
        told = values.get("prompts") or {}
        if not isinstance(told, dict) or not all(
            text is None or isinstance(text, str) for text in told.values()
        ):
            raise BundleError(f"{where}: prompts is no object of texts")
        prompts = {name: text or "" for name, text in told.items()}
        default = values.get("default_prompt_name")
        if default is not None and not (isinstance(default, str) and default in prompts):
            raise BundleError(
                f"{where}: the default prompt {shown(default)} is not among its prompts"
            )
        return str(values.get("model_type") or "SentenceTransformer"), prompts, default

    def encoder(self, path: str) -> tuple[int | None, bool]:
        """The longest text in tokens, and whether texts are lowercased."""
        values: dict[str, Any] = {}
        for name in ENCODER_NAMES:
            # In a bundle, whose encoder is not in a folder of its own, it is beside modules.json.
            values = self.object(_join(path, name)) or (path and self.object(name)) or {}
            if values:
                break
        where = self.directory / path
        if values.get("transformer_task") not in (None, "feature-extraction"):
            raise BundleError(
                f"{where}: the encoder is used for {shown(values['transformer_task'])}, not for its"
                " states"
            )
        if values.get("module_output_name") not in (None, "token_embeddings"):
            raise BundleError(f"{where}: the encoder gives {shown(values['module_output_name'])}")
        ways = values.get("modality_config")
        if isinstance(ways, dict) and "text" not in ways:
            raise BundleError(f"{where}: the encoder takes {listed_names(ways)}, and no plain text")
        longest = values.get("max_seq_length")
        if longest is not None and not (type(longest) is int and longest > 0):
            raise BundleError(f"{where}: max_seq_length is {shown(longest)}")
        return longest, values.get("do_lower_case") is True

    def pooling(self, path: str) -> tuple[tuple[str, ...], bool]:
        """The modes of pooling, and whether prompts are pooled."""
        name = _join(path, "config.json")
        values = self.object(name)
        told = values.get("pooling_mode")
        if told is None:
            flags = [key for key in values if key.startswith("pooling_mode_") and values[key]]
            if unknown := [key for key in flags if key not in _FLAGS]:
                raise BundleError(
                    f"{self.directory / name}: {unknown[0]} is not supported; there are"
                    f" {', '.join(_FLAGS)}"
                )
            told = [mode for key, mode in _FLAGS.items() if values.get(key)] or "mean"
        modes = tuple(told) if isinstance(told, list) else (told,)
        if not 0 < len(modes) <= len(POOLS) or not all(isinstance(mode, str) for mode in modes):
            raise BundleError(f"{self.directory / name}: pooling_mode is {shown(told)}")
        if unknown := [mode for mode in modes if mode not in POOLS]:
            raise BundleError(
                f"{self.directory / name}: the pooling {shown(unknown[0])} is not supported;"
                f" there are {', '.join(POOLS)}"
            )
        return modes, values.get("include_prompt", True) is not False

    def weights(self, path: str, names: Mapping[str, bool]) -> dict[str, Floats]:
        """The tensors of a module; `names` tells which it must have."""
        name = _join(path, WEIGHTS_NAME)
        file = inside(self.directory, name)
        if not file.is_file():
            raise BundleError(
                f"{file} does not exist: save the model anew with sentence-transformers, weights in"
                " pickles are not read"
            )
        arrays, _ = read_arrays(file, error=BundleError)
        self.files.append(name)
        for tensor, needed in names.items():
            if needed and tensor not in arrays:
                raise BundleError(f"{file} lacks {tensor}")
        if more := sorted(arrays.keys() - names.keys()):
            raise BundleError(f"{file} holds {shortened(more[0])}, which is not of its module")
        sizes = {array.shape[0] for array in arrays.values() if array.ndim}
        ranks = {tensor: 1 if _is_vector(tensor) else 2 for tensor in arrays}
        if len(sizes) != 1 or any(arrays[tensor].ndim != rank for tensor, rank in ranks.items()):
            shapes = {tensor: list(array.shape) for tensor, array in sorted(arrays.items())}
            raise BundleError(f"{file} holds tensors that do not fit: {shown(shapes, 120)}")
        return {tensor: values.astype(np.float32) for tensor, values in arrays.items()}


def _is_vector(tensor: str) -> bool:
    return tensor.endswith("bias") or tensor.startswith("norm.")


def _module(entry: Mapping[str, Any], file: Path) -> tuple[str, str]:
    """A module's kind and folder; code of others is never run."""
    told, path = entry.get("type"), entry.get("path", "")
    if not isinstance(told, str) or not isinstance(path, str):
        raise BundleError(f"{file}: a module has no type or no path")
    if not told.startswith(_PACKAGE):
        raise BundleError(
            f"{file} names the module {shortened(told)}, which is code of its own and is not run:"
            " only sentence-transformers' modules are supported"
        )
    return told.rpartition(".")[2], path


def _dense(reader: _Reader, path: str) -> Step:
    values = reader.object(_join(path, "config.json"))
    where = reader.directory / path
    _only_on_vectors(values, where)
    residual = values.get("use_residual") is True
    weights = reader.weights(
        path,
        {
            "linear.weight": True,
            "linear.bias": values.get("bias", True) is not False,
            "residual.weight": residual and values.get("in_features") != values.get("out_features"),
        },
    )
    told = values.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = _ACTIVATIONS.get(str(told).rpartition(".")[2])
    if activation is None or not str(told).startswith("torch.nn."):
        raise BundleError(
            f"{where}: the activation {shown(told)} is not supported; there are"
            f" {', '.join(_ACTIVATIONS)}"
        )
    W, bias = weights["linear.weight"], weights.get("linear.bias")
    beside = weights.get("residual.weight")

    def step(x: Floats) -> Floats:
        _check_size(x, W.shape[1], where)
        y: Floats = activation(x @ W.T + (0 if bias is None else bias))
        if residual:
            y = y + (x if beside is None else x @ beside.T)
        return y

    return step


def _layer_norm(reader: _Reader, path: str) -> Step:
    reader.object(_join(path, "config.json"))
    weights = reader.weights(path, {"norm.weight": True, "norm.bias": True})

    def step(x: Floats) -> Floats:
        _check_size(x, weights["norm.weight"].size, reader.directory / path)
        centered = x - x.mean(axis=1, keepdims=True)
        deviation = np.sqrt((centered**2).mean(axis=1, keepdims=True) + np.float32(1e-5))
        scaled: Floats = centered / deviation * weights["norm.weight"] + weights["norm.bias"]
        return scaled

    return step


def _normalizing(reader: _Reader, path: str) -> Step:
    # Its older form has no files, and not even a folder.
    values = reader.object(_join(path, "config.json")) if path else {}
    _only_on_vectors(values, reader.directory / path)
    return _normalize


def _normalize(x: Floats) -> Floats:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    scaled: Floats = x / np.maximum(length, _LEAST)
    return scaled


_STEPS: Final[Mapping[str, Callable[[_Reader, str], Step]]] = {
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Normalize": _normalizing,
}
_ACTIVATIONS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "GELU": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2))),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "SiLU": lambda x: x / (1 + np.exp(-x)),
}


def _only_on_vectors(values: Mapping[str, Any], where: Path) -> None:
    for name in ("module_input_name", "module_output_name"):
        if values.get(name) not in (None, _VECTOR):
            raise BundleError(
                f"{where}: {name} is {shown(values[name])}, only {_VECTOR!r} is supported"
            )


def _check_size(x: Floats, size: int, where: Path) -> None:
    if x.shape[1] != size:
        raise BundleError(f"{where} takes vectors of {size}, the pooling gives {x.shape[1]}")


def _join(path: str, name: str) -> str:
    return f"{path.rstrip('/')}/{name}" if path else name
