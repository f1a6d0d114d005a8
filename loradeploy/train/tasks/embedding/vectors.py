"""Compute the vectors of texts in PyTorch, by the recipe that sentence-transformers saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, normalize

from loradeploy.bundle.text.beside import copy_recipe
from loradeploy.bundle.text.vectors.files import PROMPTS_NAME
from loradeploy.bundle.text.vectors.recipe import (
    SentenceRecipe,
    default_recipe,
    read_recipe,
    recipe_directory,
    write_default,
)
from loradeploy.bundle.text.vectors.steps import Dense, LayerNorm, check_size
from loradeploy.bundle.text.vectors.steps import normalize as normalize_step
from loradeploy.errors import BundleError
from loradeploy.files import optional_json, write_json
from loradeploy.train.config import NO_PROMPT, SCORED_LOSSES, TrainConfig
from loradeploy.train.tasks.embedding.pooling import pooled

# Names of the prompts of queries and of documents. The first one that exists is used, as in
# sentence-transformers' encode_query and encode_document.
_QUERY: Final = ("query",)
_DOCUMENT: Final = ("document", "passage", "corpus")


@dataclass(frozen=True, eq=False)
class Vectors:
    """How vectors of texts are computed in a training run.

    `source`: the directory of `recipe`, None for the default recipe. `prompts`: the prompts of the
    first and of the other texts of an example. `own`: whether it differs from what the base
    specifies, so that the adapter needs its own files. `given`: whether a prompt was given.
    """

    recipe: SentenceRecipe
    source: Path | None
    prompts: tuple[str, str]
    own: bool
    given: bool

    def text(self, text: str) -> str:
        """The input of the tokenizer for `text`, which includes the prompt."""
        return text.lower() if self.recipe.lowercase else text

    def of(self, states: Tensor, mask: Tensor) -> Tensor:
        """The vectors, float32 [batch, size], of states [batch, sequence, hidden].

        `mask`: int64 [batch, sequence], 1 at the tokens that are pooled.
        """
        found = pooled(states, mask, self.recipe.pooling)
        for step in self.recipe.steps:
            found = _STEPS[type(step)](step, found)
        return found

    def write(self, directory: Path) -> None:
        """Write the files of sentence-transformers for these vectors."""
        if self.source is None:
            write_default(directory)
        else:
            copy_recipe(self.source, self.recipe.files, directory)
        if not self.given:
            return
        file = directory / PROMPTS_NAME
        settings = optional_json(file, error=BundleError)
        prompts = {**self.recipe.prompts, _QUERY[0]: self.prompts[0], _DOCUMENT[0]: self.prompts[1]}
        write_json(file, {**settings, "prompts": prompts})


def vectors_of(config: TrainConfig, base: Path | None, adapter: Path | None) -> Vectors:
    """How vectors are computed: by the files beside `adapter`, or else beside `base`.

    If neither has a modules.json, vectors are the normalized mean of the tokens' states. Prompts
    are the given ones, or else the saved ones. For scored pairs, saved prompts of queries and
    documents are only used from beside the adapter; others have the default prompt.

    Raises:
        BundleError: a file is invalid, or a module is not supported.
    """
    recipe, source, own = default_recipe(), None, False
    for directory in (adapter, base):
        found = None if directory is None else recipe_directory(directory)
        read = None if found is None else read_recipe(found)
        if read is not None:
            recipe, source, own = read, found, directory is adapter
            break
    # In scored pairs, neither text is a query, unless the adapter was trained with prompts.
    named = config.embedding_loss not in SCORED_LOSSES or own
    prompts = (
        _prompt(recipe, config.query_prompt, _QUERY if named else ()),
        _prompt(recipe, config.document_prompt, _DOCUMENT if named else ()),
    )
    given = bool(config.query_prompt or config.document_prompt)
    return Vectors(recipe, source, prompts, own or given, given)


def _prompt(recipe: SentenceRecipe, given: str, names: Sequence[str]) -> str:
    if given:
        return "" if given == NO_PROMPT else given
    name = next((name for name in names if name in recipe.prompts), recipe.default_prompt)
    return "" if name is None else recipe.prompts[name]


def _dense(step: Dense, x: Tensor) -> Tensor:
    check_size(x.shape[1], step.W.shape[1], step.where)
    bias = None if step.bias is None else _as(x, step.bias)
    activation = getattr(torch.nn, step.activation)()
    y: Tensor = activation(linear(x, _as(x, step.W), bias))
    if step.residual:
        y = y + (x if step.beside is None else linear(x, _as(x, step.beside)))
    return y


def _layer_norm(step: LayerNorm, x: Tensor) -> Tensor:
    check_size(x.shape[1], step.weight.size, step.where)
    return layer_norm(x, x.shape[1:], _as(x, step.weight), _as(x, step.bias), eps=1e-5)


def _normalize(_: Any, x: Tensor) -> Tensor:
    return normalize(x, dim=-1)


# The steps of `bundle.text.vectors.steps` in PyTorch, by type. Normalization is a function there.
_STEPS: Final[Mapping[type, Callable[[Any, Tensor], Tensor]]] = {
    Dense: _dense,
    LayerNorm: _layer_norm,
    type(normalize_step): _normalize,
}


def _as(x: Tensor, values: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(values).to(x)
