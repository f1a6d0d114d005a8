"""How sentence-transformers' cross-encoders score pairs of texts, by the files saved with them.

config_sentence_transformers.json  the activation, prompts by name, the name of the default prompt
modules.json                       the modules: only an encoder with a classifier head is supported
sentence_bert_config.json          in the encoder's folder: the maximum length
config.json                        the activation, in cross-encoders of versions before 6
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loradeploy.bundle.text.vectors.files import (
    CROSS_ENCODER,
    PROMPTS_NAME,
    RecipeReader,
    module_of,
)
from loradeploy.bundle.text.vectors.recipe import recipe_directory
from loradeploy.errors import BundleError, shown
from loradeploy.names import MODULES_NAME

SIGMOID: Final = "sigmoid"
IDENTITY: Final = "identity"
ACTIVATIONS: Final = (SIGMOID, IDENTITY)


@dataclass(frozen=True)
class PairScoring:
    """How pairs of texts are scored.

    `declared`: the name of the activation's class; None for the default, the sigmoid.
    `prompts`: by name; a prompt is put before the first text. `default_prompt`: the name of one.
    `max_length`: the maximum number of tokens of a pair, None for the tokenizer's limit.
    `where`: the file that declares the activation, for messages. `files`: the files that it was
    read from, relative to their directory. `refusal`: why pairs cannot be scored, or None.
    """

    declared: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_length: int | None = None
    where: Path = field(default=Path(), compare=False)
    files: tuple[str, ...] = field(default=(), compare=False)
    refusal: str | None = None

    def check(self) -> None:
        """Raise BundleError if pairs cannot be scored."""
        if self.refusal is not None:
            raise BundleError(self.refusal)

    def activation(self) -> str:
        """One of ACTIVATIONS; raises BundleError if another one is declared."""
        if self.declared is None:
            return SIGMOID
        name = self.declared.rpartition(".")[2].lower()
        if name not in ACTIVATIONS:
            raise BundleError(
                f"{self.where}: the activation function is {shown(self.declared)}: choose"
                f" `activation`, {' or '.join(ACTIVATIONS)}"
            )
        return name


def read_scoring(directory: Path) -> PairScoring | None:
    """The scoring of the cross-encoder in `directory`; None if its files are not a cross-encoder's.

    Unsupported files are returned as a `refusal`, because only scores depend on them.
    """
    found = recipe_directory(directory)
    if found is None:
        return None
    reader = RecipeReader(found)
    try:
        settings = reader.settings()
        if settings.kind != CROSS_ENCODER:
            return None
        file = found / MODULES_NAME
        modules = [module_of(entry, file) for entry in reader.list(MODULES_NAME)]
        kinds = [kind for kind, _ in modules]
        if kinds != ["Transformer"]:
            raise BundleError(
                f"{file} names the modules {', '.join(kinds)}: only a Transformer with a classifier"
                " head is supported"
            )
        longest, lowercase = reader.encoder(
            modules[0][1], task="sequence-classification", output="scores"
        )
        if lowercase:
            raise BundleError(f"{found}: do_lower_case is not supported for pairs of texts")
    except BundleError as problem:
        files = tuple(dict.fromkeys((*reader.files, MODULES_NAME)))
        return PairScoring(files=files, refusal=str(problem))
    return PairScoring(
        declared=settings.activation,
        prompts=settings.prompts,
        default_prompt=settings.default_prompt,
        max_length=longest,
        where=found / PROMPTS_NAME,
        files=tuple(reader.files),
    )


def declared_in_config(config: Mapping[str, Any], where: Path) -> PairScoring:
    """The scoring that the object of a config.json declares; `where`: its path, for messages."""
    known = config.get("sentence_transformers")
    declared = known.get("activation_fn") if isinstance(known, Mapping) else None
    # The name in versions before 4.
    declared = declared or config.get("sbert_ce_default_activation_function")
    return PairScoring(None if declared is None else str(declared), where=where)
