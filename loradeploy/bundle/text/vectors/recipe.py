"""Recipes that convert an encoder's states to a text's vector, as sentence-transformers saves them.

modules.json                       the modules in order, each with its type and folder
sentence_bert_config.json          in the encoder's folder: maximum length and lowercasing of texts
config_sentence_transformers.json  prompts by name, and the name of the default prompt
1_Pooling/config.json              how the tokens' states are pooled
2_Dense/config.json                a layer on the pooled vector; its weights: model.safetensors

These files are beside the base, and beside adapters that sentence-transformers trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.files.digest import file_digest
from loradeploy.bundle.text.vectors.files import (
    EMBEDDER,
    PACKAGE,
    PROMPTS_NAME,
    Pooling,
    RecipeReader,
    module_of,
)
from loradeploy.bundle.text.vectors.pooling import POOLS
from loradeploy.bundle.text.vectors.steps import STEPS, Dense, LayerNorm, normalize
from loradeploy.errors import BundleError, UsageError, shortened
from loradeploy.files import write_json
from loradeploy.names import MODULES_NAME
from loradeploy.paths import resolved

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    # From vectors [batch, size] to vectors [batch, other size].
    Step = Callable[[Floats], Floats]


@dataclass(frozen=True, eq=False)
class SentenceRecipe:
    """The conversion of a text to its vector.

    `pooling`: modes by sentence-transformers' names; their vectors are concatenated.
    `include_prompt`: whether a prompt's tokens are pooled, too.
    `steps`: the functions that are applied to the pooled vectors, in order.
    `max_length`: the maximum number of tokens of a text, None for the tokenizer's limit.
    `size`: the number of leading values of a vector that are kept (truncate_dim), None for all.
    `files`: the files that it was read from, relative to its directory; `digest`: their digest.
    """

    pooling: tuple[str, ...]
    steps: tuple[Step, ...]
    include_prompt: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_length: int | None = None
    lowercase: bool = False
    size: int | None = None
    files: tuple[str, ...] = ()
    digest: str = ""

    def same(self, other: SentenceRecipe) -> bool:
        """Whether both were read from the same files."""
        return self is other or self.digest == other.digest

    def vectors(
        self, states: NDArray[Any], mask: NDArray[np.int64], prompt_tokens: int = 0
    ) -> Floats:
        """The vectors [batch, size] of states [batch, sequence, hidden], padded on the right.

        `mask`: int64 [batch, sequence]. `prompt_tokens`: the number of a prompt's tokens at the
        beginning of each row.

        Raises:
            UsageError: no token of a text would be pooled.
        """
        pooled_over = mask
        if prompt_tokens and not self.include_prompt:
            pooled_over = mask.copy()
            pooled_over[:, :prompt_tokens] = 0
            if not pooled_over.any(axis=1).all():
                raise UsageError(
                    "a text has no tokens after its prompt, and those of the prompt are not pooled:"
                    " it has no vector. Leave out empty texts, and prompts that fill the maximum"
                    " length"
                )
        values = states.astype(np.float32)
        vectors = np.concatenate([POOLS[m](values, pooled_over) for m in self.pooling], axis=1)
        return self.scaled(vectors)

    @property
    def only_scales(self) -> bool:
        """Whether all tokens are pooled and the only steps are normalization."""
        scaled = all(step is normalize for step in self.steps)
        return self.include_prompt and scaled and self.size is None

    def scaled(self, pooled: NDArray[Any]) -> Floats:
        """Apply the steps to pooled vectors [batch, size], and truncate them to `size`."""
        vectors = pooled.astype(np.float32)
        for step in self.steps:
            vectors = step(vectors)
        return vectors[:, : self.size].astype(np.float32)


def read_recipe(directory: Path) -> SentenceRecipe | None:
    """The recipe in `directory`; None if it has no modules.json.

    Raises:
        BundleError: a file is invalid, or a module is not supported.
    """
    file = directory / MODULES_NAME
    if not file.is_file():
        return None
    reader = RecipeReader(directory)
    entries = reader.list(MODULES_NAME)
    encoder = module_of(entries[0], file) if entries else None
    if encoder is None or encoder[0] != "Transformer":
        raise BundleError(f"{file}: the first module is not a Transformer: only that is supported")
    settings = reader.settings()
    if settings.kind != EMBEDDER:
        raise BundleError(
            f"{directory / PROMPTS_NAME} is a {shortened(settings.kind)}'s, which is not supported:"
            f" a {EMBEDDER} returns one vector per text"
        )
    max_length, lowercase = reader.encoder(encoder[1])
    pooling: Pooling | None = None
    sized: int | None = None
    steps: list[Step] = []
    for entry in entries[1:]:
        kind, path = module_of(entry, file)
        if kind == "Pooling" and pooling is None:
            pooling = reader.pooling(path)
            if pooling.size is not None:
                reader.check_size(encoder[1], pooling.size)
                sized = pooling.size * len(pooling.modes)
        elif kind == "Dropout":
            continue
        elif kind in STEPS and pooling is not None:
            step = STEPS[kind](reader, path)
            sized = step.size_after(sized) if isinstance(step, Dense | LayerNorm) else sized
            steps.append(step)
        else:
            where = " before the Pooling" if pooling is None else ""
            known = ", ".join(("Transformer", "Pooling", "Dropout", *STEPS))
            raise BundleError(
                f"{file} names a module {shortened(kind)}{where} ({shortened(path)}), which is not"
                f" supported; there are {known}"
            )
    if pooling is None:
        raise BundleError(f"{file} names no Pooling, which defines the vector of a text")
    return SentenceRecipe(
        pooling=pooling.modes,
        steps=tuple(steps),
        include_prompt=pooling.include_prompt,
        prompts=settings.prompts,
        default_prompt=settings.default_prompt,
        max_length=max_length,
        lowercase=lowercase,
        size=settings.size,
        files=tuple(reader.files),
        digest=" ".join(file_digest(directory / name) for name in sorted(reader.files)),
    )


def recipe_directory(directory: Path) -> Path | None:
    """The directory with the recipe of the model or adapter in `directory`; None if there is none.

    It is `directory`, or its parent if `directory` is the folder of the encoder or of ONNX graphs.
    """
    if (directory / MODULES_NAME).is_file():
        return directory
    above = resolved(directory).parent
    if not (above / MODULES_NAME).is_file():
        return None
    name = resolved(directory).name
    modules = RecipeReader(above).list(MODULES_NAME)
    encoder = modules[0].get("path") if modules else None
    return above if name in ("onnx", encoder) else None


def default_recipe() -> SentenceRecipe:
    """The recipe without files: the normalized mean of the tokens' states, as in most models."""
    return SentenceRecipe(("mean",), (normalize,))


def write_default(directory: Path) -> None:
    """Write the files of `default_recipe`, for adapters that use it on a base with another one."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"{PACKAGE}models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    write_json(directory / MODULES_NAME, entries)
    pooling = directory / "1_Pooling"
    pooling.mkdir(exist_ok=True)
    write_json(pooling / "config.json", {"pooling_mode": "mean"})


def flat_modules(directory: Path) -> list[Any]:
    """The entries of modules.json with the encoder in the directory itself, as in a bundle."""
    entries = RecipeReader(directory).list(MODULES_NAME)
    return [{**entry, "path": ""} if entry is entries[0] else entry for entry in entries]
