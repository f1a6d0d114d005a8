"""Make one tower of a two-tower model (CLIP, SigLIP) a separate model to trace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.fitting.towers import TEXT, TOWERS
from loradeploy.bundle.names import ATTENTION_MASK, INPUT_IDS, PIXEL_VALUES
from loradeploy.errors import ModelError
from loradeploy.export.towers import TowerKind

if TYPE_CHECKING:
    import torch


# The parameters that scale the logits of pairs of a text and an image.
_LOGITS: Final = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class TextForm:
    """The form of texts of a padded tower: their length, the padding token, the inputs."""

    length: int
    pad: int | None
    inputs: tuple[str, ...]


def text_form(config: Any, tokenizer: Any, where: object) -> TextForm:
    """The form of texts of a padded tower, by its `config` and `tokenizer`: None if it has none.

    Raises:
        ModelError: the tokenizer pads on the left, or has no padding token.
    """
    length = int(config.max_position_embeddings)
    if tokenizer is None:
        return TextForm(length, config.pad_token_id, (INPUT_IDS,))
    if tokenizer.padding_side != "right":
        raise ModelError(
            f"{where}: the tokenizer has the padding_side {tokenizer.padding_side!r}, and the"
            " model's vector is of a text's last token, which is padding as it is trained: set"
            ' padding_side to "right" in tokenizer_config.json'
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{where}: the tokenizer has no pad_token, and each text is padded")
    masked = ATTENTION_MASK in tokenizer.model_input_names
    return TextForm(
        min(length, int(tokenizer.model_max_length)),
        int(tokenizer.pad_token_id),
        (INPUT_IDS, ATTENTION_MASK) if masked else (INPUT_IDS,),
    )


def make_tower(model: Any, kind: TowerKind, form: TextForm | None = None) -> torch.nn.Module:
    """Make the tower `kind` of `model`, with modules named as in the whole model.

    Its attributes: `tower_kind` and `text_form`, the arguments; `config`, that of the tower; and
    `logits`, the parameters that scale the logits of pairs (`logit_scale`, `logit_bias`).
    """
    import torch
    from transformers.utils import ModelOutput

    body, *projections = (name for name in TOWERS[kind.tower] if hasattr(model, name))

    class Tower(torch.nn.Module):
        base_model_prefix = ""

        def __init__(self) -> None:
            super().__init__()
            for name in (body, *projections):
                setattr(self, name, getattr(model, name))
            self.tower_kind, self.text_form = kind, form
            self.config = getattr(self, body).config
            self.logits = {name: getattr(model, name) for name in _LOGITS if hasattr(model, name)}

        def get_input_embeddings(self) -> torch.nn.Module:
            found: torch.nn.Module = getattr(self, body).get_input_embeddings()
            return found

        def _vector(self, feeds: Mapping[str, torch.Tensor | None]) -> Any:
            vector = getattr(self, body)(**feeds).pooler_output
            for name in projections:
                vector = getattr(self, name)(vector)
            found = ModelOutput()
            found[kind.output] = vector
            return found

    class TextTower(Tower):
        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
        ) -> Any:
            return self._vector({INPUT_IDS: input_ids, ATTENTION_MASK: attention_mask})

    class ImageTower(Tower):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            return self._vector({PIXEL_VALUES: pixel_values})

    return TextTower() if kind.tower == TEXT else ImageTower()


def tower_config(tower: Any) -> dict[str, Any]:
    """The config.json of a tower, as transformers writes that of its class, with all defaults.

    It also has the values of the logits' scale and bias, which are weights of the whole model.
    """
    body, *projections = (name for name in TOWERS[tower.tower_kind.tower] if hasattr(tower, name))
    values: dict[str, Any] = json.loads(tower.config.to_json_string(use_diff=False))
    architecture = type(getattr(tower, body)).__name__
    for name in projections:
        architecture += "WithProjection"
        values["projection_dim"] = getattr(tower, name).out_features
    if tower.text_form is not None:
        values |= {
            "pad_token_id": tower.text_form.pad,
            "max_position_embeddings": tower.text_form.length,
        }
    logits = {name: float(value.detach()) for name, value in tower.logits.items()}
    return {**values, "architectures": [architecture], **logits}
