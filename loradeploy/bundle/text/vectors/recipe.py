"""How an encoder's states become a text's vector: the modules that sentence-transformers saves.

modules.json                       the modules in their order, each with its type and folder
sentence_bert_config.json          in the encoder's folder: the longest text, and its letter case
config_sentence_transformers.json  prompts by name, and which one is the default
1_Pooling/config.json              what is taken of the tokens' states
2_Dense/config.json                a layer on the pooled vector, its weights in model.safetensors

They lie beside the base, and beside an adapter that sentence-transformers trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.files.digest import file_digest
from loradeploy.bundle.text.vectors.files import (
    MODULES_NAME,
    PACKAGE,
    PROMPTS_NAME,
    RecipeReader,
    module_of,
)
from loradeploy.bundle.text.vectors.pooling import POOLS
from loradeploy.bundle.text.vectors.steps import STEPS, Dense, LayerNorm, normalize
from loradeploy.errors import BundleError, UsageError, shortened
from loradeploy.files import write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    # Of vectors [batch, size] to vectors [batch, another size].
    Step = Callable[[Floats], Floats]


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

        Raises:
            UsageError: nothing of a text would be pooled.
        """
        pooled_over = mask
        if prompt_tokens and not self.include_prompt:
            pooled_over = mask.copy()
            pooled_over[:, :prompt_tokens] = 0
            if not pooled_over.any(axis=1).all():
                raise UsageError(
                    "a text has no tokens after its prompt, whose own are not pooled: it has no"
                    " vector. Leave out empty texts, and prompts longer than the longest text"
                )
        values = states.astype(np.float32)
        vectors = np.concatenate([POOLS[m](values, pooled_over) for m in self.pooling], axis=1)
        return self.scaled(vectors)

    @property
    def only_scales(self) -> bool:
        """Whether nothing but normalization is done to what is pooled."""
        return self.include_prompt and all(step is normalize for step in self.steps)

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
    reader = RecipeReader(directory)
    entries = reader.list(MODULES_NAME)
    encoder = module_of(entries[0], file) if entries else None
    if encoder is None or encoder[0] != "Transformer":
        raise BundleError(f"{file}: the first module is not a Transformer: only that is supported")
    model_type, prompts, default = reader.prompts()
    if model_type != "SentenceTransformer":
        raise BundleError(
            f"{directory / PROMPTS_NAME} is a {shortened(model_type)}'s, which is not supported: a"
            " SentenceTransformer gives one vector a text"
        )
    max_length, lowercase = reader.encoder(encoder[1])
    pooling: tuple[str, ...] = ()
    include_prompt = True
    sized: int | None = None
    steps: list[Step] = []
    for entry in entries[1:]:
        kind, path = module_of(entry, file)
        if kind == "Pooling" and not pooling:
            pooling, include_prompt, size = reader.pooling(path)
            if size is not None:
                reader.check_size(encoder[1], size)
                sized = size * len(pooling)
        elif kind == "Dropout":
            continue
        elif kind in STEPS and pooling:
            step = STEPS[kind](reader, path)
            sized = step.size_after(sized) if isinstance(step, Dense | LayerNorm) else sized
            steps.append(step)
        else:
            where = "" if pooling else " before the Pooling"
            known = ", ".join(("Transformer", "Pooling", "Dropout", *STEPS))
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
    modules = RecipeReader(above).list(MODULES_NAME)
    encoder = modules[0].get("path") if modules else None
    return above if name in ("onnx", encoder) else None


def default_recipe() -> SentenceRecipe:
    """Without any file: the mean of the tokens' states at length 1, as most are trained."""
    return SentenceRecipe(("mean",), (normalize,))


def write_default(directory: Path) -> None:
    """Write the files of `default_recipe`, for what was trained by it on a base with another."""
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
    """The entries of modules.json with the encoder in the directory itself, as a bundle has it."""
    first, *rest = RecipeReader(directory).list(MODULES_NAME)
    return [{**first, "path": ""}, *rest]
