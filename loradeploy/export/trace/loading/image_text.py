"""Split models of images and text in two parts: the decoder, and the vision tower with projector.

    pixel_values → vision tower → projector → image_features        task vision-tower
    input_ids, and image_features in place of image tokens → decoder → logits        task causal-lm

The decoder's bundle takes the features as `inputs_embeds` (export/passes/tokens/embeds.py). Each
part is exported from the whole checkpoint with its modules' own names, so that an adapter for the
whole model has factors for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.tasks import CAUSAL_LM, VISION_TOWER
from loradeploy.errors import ExportError, shortened
from loradeploy.export.trace.architectures import qwen_vision

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Family:
    """The parts of a family of models, as paths in the model with the output head.

    `vision`: the vision tower and the projector. `decoder`: the decoder. `head`: the output head.
    `features`: computes the embeddings of image tokens [images, tokens, hidden] with the model
    without its head from pixel values [images, channels, height, width]. `towers`: the model types
    of vision towers that `features` supports. `blocks`: whether the tokens of an image attend to
    each other in both directions. `mrope`: whether the decoder has positions in three dimensions.
    `patches`: for a tower that takes images in patches, [images, rows, columns, merged, values],
    computes the last two sizes from the model without its head.
    """

    vision: tuple[str, ...]
    decoder: str
    features: Callable[[Any, torch.Tensor], torch.Tensor]
    towers: tuple[str, ...]
    head: str = "lm_head"
    blocks: bool = False
    mrope: bool = False
    patches: Callable[[Any], tuple[int, int]] | None = None


def _connected(inner: Any, pixels: torch.Tensor) -> torch.Tensor:
    states: torch.Tensor = inner.vision_model(pixel_values=pixels).last_hidden_state
    features: torch.Tensor = inner.connector(states)
    return features


def _projected(inner: Any, pixels: torch.Tensor) -> torch.Tensor:
    import torch

    chosen = inner.config.vision_feature_layer
    states = inner.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
    first = 1 if inner.config.vision_feature_select_strategy == "default" else 0  # the class token
    layers = [chosen] if isinstance(chosen, int) else chosen
    joined = torch.cat([states[layer][:, first:] for layer in layers], dim=-1)
    features: torch.Tensor = inner.multi_modal_projector(joined)
    return features


def _pooled(inner: Any, pixels: torch.Tensor) -> torch.Tensor:
    states: torch.Tensor = inner.vision_tower(pixel_values=pixels).last_hidden_state
    features: torch.Tensor = inner.multi_modal_projector(states)
    return features


_SMOLVLM: Final = Family(
    ("model.vision_model", "model.connector"),
    "model.text_model",
    _connected,
    ("smolvlm_vision", "idefics3_vision"),
)


def _qwen(name: str) -> Family:
    return Family(
        ("model.visual",),
        "model.language_model",
        qwen_vision.image_features,
        (f"{name}_vision", name),  # older checkpoints have the type of the whole model
        mrope=True,
        patches=lambda inner: qwen_vision.patch_sizes(inner.visual),
    )


# By model type. Others need more than embeddings in place of tokens: in PaliGemma all tokens of a
# prompt attend to each other.
FAMILIES: Final[Mapping[str, Family]] = {
    "smolvlm": _SMOLVLM,
    "idefics3": _SMOLVLM,
    "llava": Family(
        ("model.vision_tower", "model.multi_modal_projector"),
        "model.language_model",
        _projected,
        ("clip_vision_model", "siglip_vision_model"),
    ),
    "gemma3": Family(
        ("model.vision_tower", "model.multi_modal_projector"),
        "model.language_model",
        _pooled,
        ("siglip_vision_model",),
        blocks=True,
    ),
    "qwen2_vl": _qwen("qwen2_vl"),
    "qwen2_5_vl": _qwen("qwen2_5_vl"),
}


def has_mrope(config: Mapping[str, Any], task: str) -> bool:
    """Whether the task exports a decoder with positions in an image's grid."""
    family = family_of(config, task) if task == CAUSAL_LM else None
    return family is not None and family.mrope


def family_of(config: Mapping[str, Any], task: str) -> Family | None:
    """The family of a checkpoint by its config.json; None if it is not a model of images and text.

    Raises:
        ExportError: the vision tower is requested, and is not supported for this model.
    """
    name = str(config.get("model_type"))
    family = FAMILIES.get(name)
    if family is None and task == VISION_TOWER:
        raise ExportError(
            f"the vision tower of {shortened(name, 40)} cannot be exported: only those of"
            f" {', '.join(FAMILIES)} can"
        )
    tower = config.get("vision_config", {}).get("model_type")
    if family is not None and task == VISION_TOWER and tower not in (None, *family.towers):
        raise ExportError(
            f"the vision tower of {shortened(name, 40)} cannot be exported where it is"
            f" {shortened(str(tower), 40)}: only {', '.join(family.towers)} can"
        )
    return family


def has_image_blocks(config: Mapping[str, Any]) -> bool:
    """Whether the image tokens of a decoder attend to each other in both directions."""
    family = FAMILIES.get(str(config.get("model_type")))
    return family is not None and family.blocks


def other_part(config: Mapping[str, Any], task: str) -> tuple[str, ...]:
    """The modules of a checkpoint that are exported for another task than `task`."""
    if task not in (CAUSAL_LM, VISION_TOWER) or (family := family_of(config, task)) is None:
        return ()
    return family.vision if task == CAUSAL_LM else (family.decoder, family.head)


def vision_part(model: Any) -> Any:
    """Remove the decoder of `model`; `forward` then takes pixel values and gives `image_features`.

    The attribute `patch_sizes` is set to the last two sizes of images in patches, else to None.
    """
    from transformers.modeling_outputs import BaseModelOutput

    family = FAMILIES[model.config.model_type]

    def forward(pixel_values: torch.Tensor) -> Any:
        features = family.features(model.model, pixel_values)
        result = BaseModelOutput()
        result["image_features"] = features
        return result

    model.patch_sizes = None if family.patches is None else family.patches(model.model)
    for path in (family.decoder, family.head):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, None)
    model.forward = forward
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    return model
