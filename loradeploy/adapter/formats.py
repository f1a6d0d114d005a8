"""What an adapter of another library is, by its content, and what can be done with it here.

Every function returns the rest of a sentence that begins with the place ("… is an adapter of
mlx-lm: fuse it …"), or None where it knows nothing better than its caller.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.errors import AdapterError, LoraDeployError, listed_names, shortened
from loradeploy.files import open_file, read_json

_CONFIG: Final = "adapter_config.json"
_TENSORS: Final = ".safetensors"

_MLX: Final = (
    "is an adapter of mlx-lm (lora_a, lora_b), not of PEFT: fuse it into its base with"
    " mlx_lm.fuse --dequantize, and export the model that this writes"
)
_KOHYA: Final = (
    "is an adapter of kohya's sd-scripts (lora_down, lora_up) for a diffusion model, which is not"
    " exported here: fuse it with diffusers (load_lora_weights, fuse_lora) and export that"
)
_DIFFUSERS: Final = (
    "is an adapter of diffusers for a diffusion model, which is not exported here: fuse it with"
    " diffusers (load_lora_weights, fuse_lora) and export that"
)
_TORCHTUNE: Final = (
    "is an adapter in torchtune's own names (lora_a.weight, lora_b.weight): have its checkpointer"
    " write PEFT's, adapter_config.json and adapter_model.safetensors, and give that directory"
)
_GGUF: Final = (
    "is a GGUF file of llama.cpp, not an adapter of PEFT: give the PEFT directory that it was"
    " converted from"
)
_WHOLE: Final = (
    "is no adapter, it is a whole model with all its weights: export it as the model, `model`"
)
_NO_CONFIG: Final = (
    "holds LoRA factors and no adapter_config.json, which tells their rank, alpha and targets:"
    " copy it from where the adapter was saved"
)
_SHARDED: Final = (
    "holds no adapter_model.safetensors but DeepSpeed's shards of it (global_step…): make it of"
    " them with the zero_to_fp32.py that lies beside"
)
_NAMED: Final = re.compile(r"\.lora_(?:embedding_)?[AB]\.(?!weight$|bias$)(?P<name>[^.]+)(\.|$)")

_DIFFUSED: Final = re.compile(
    r"(unet|text_encoder(_\d)?|transformer\.(single_)?transformer_blocks)\..*lora"
)

# PEFT's types that learn inputs rather than weights: nothing of them can be merged.
_PROMPTS: Final = (
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"),
    *("P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"),
)


def other_peft_type(peft_type: object) -> str:
    """What to do with an adapter of another of PEFT's types than LORA."""
    if peft_type in _PROMPTS:
        return "it learns inputs, not weights, and cannot be exported: train a LoRA instead"
    if peft_type == "XLORA":
        return "it chooses between adapters for each token, which cannot be exported"
    return "merge it with PEFT (merge_and_unload) and export the merged model"


def other_config(values: Mapping[str, Any]) -> str | None:
    """Whose adapter_config.json holds `values`, where it is not PEFT's."""
    if "peft_type" in values:
        return None
    if "lora_parameters" in values or "fine_tune_type" in values:
        return _MLX
    inner = values.get("config")
    kind = values.get("architecture") or (
        inner.get("architecture") if isinstance(inner, Mapping) else None
    )
    if kind is not None or (isinstance(inner, Mapping) and "model_name" in values):
        if kind == "lora":
            return (
                "is a LoRA of AdapterHub's adapters library, not of PEFT: merge it there"
                " (model.merge_adapter), save the model and export that"
            )
        return (
            "is an adapter of AdapterHub's adapters library, of layers between the base's, which"
            " are not exported: train a LoRA with PEFT instead"
        )
    return None


def other_tensors(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Whose tensors are called so, where they are not those of one PEFT adapter, whole."""
    empty = [key for key, shape in shapes.items() if 0 in shape]
    if empty:
        return (
            f"holds {len(empty)} empty tensors of {len(shapes)} (first {shortened(empty[0])}):"
            " DeepSpeed ZeRO-3 saves them so where it does not gather them. Save it again with"
            " stage3_gather_16bit_weights_on_model_save, or use zero_to_fp32.py"
        )
    if any(key.startswith(("lora_unet_", "lora_te")) for key in shapes):
        return _KOHYA
    if any(key.endswith((".lora_a", ".lora_b")) for key in shapes):
        return _MLX
    if any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in shapes):
        return _TORCHTUNE
    if any(_DIFFUSED.match(key) for key in shapes):
        return _DIFFUSERS
    named = {found["name"] for key in shapes if (found := _NAMED.search(key))}
    if named:
        return (
            f"has the names of adapters in its keys ({listed_names(sorted(named), 3)}), as a"
            " model's state_dict() does: save one with PEFT's save_pretrained"
        )
    if shapes and not any("lora" in key.lower() for key in shapes):
        return (
            f"holds no LoRA factors but {len(shapes)} whole weights (first"
            f" {shortened(next(iter(shapes)))}): if it is a model that was trained whole, give its"
            " directory as `model`"
        )
    return None


def other_directory(place: Path) -> str | None:
    """What the directory `place` is, that has no adapter of PEFT in it."""
    if inner := _adapters_inside(place):
        newest = newest_checkpoint(inner)
        if newest is not None:
            return (
                f"is no adapter itself but holds {len(inner)} checkpoints of a training run: give"
                f" the newest, {place / newest}"
            )
        if len(inner) == 1:
            return f"is no adapter itself, its folder {inner[0]} is: give {place / inner[0]}"
        several = listed_names(inner, 4)
        return f"is no adapter itself but holds {len(inner)} in folders: give one of {several}"
    peft = False
    if (place / _CONFIG).is_file():
        with contextlib.suppress(AdapterError):
            values = read_json(place / _CONFIG, error=AdapterError)
            if (told := other_config(values)) is not None:
                return told
            peft = True
    if any(place.glob("head_config.json")) or any(place.glob("pytorch_adapter.bin")):
        return other_config({"architecture": "unknown"})
    files = sorted(place.glob(f"*{_TENSORS}"))
    if (place / "config.json").is_file() and (files or any(place.glob("pytorch_model*.bin"))):
        return _WHOLE
    for file in files:
        if (told := other_file(file)) is not None:
            return f"holds {file.name}, which {told}"
    if any(place.glob("*.gguf")):
        return _GGUF
    if peft and any(place.glob("global_step*")):
        return _SHARDED
    if any(place.glob("adapters.npz")):
        return _MLX
    return None


def other_file(file: Path) -> str | None:
    """What the file `file` is, that has no adapter_config.json beside it."""
    with contextlib.suppress(OSError, AdapterError), open_file(file, error=AdapterError) as opened:
        if opened.read(4) == b"GGUF":
            return _GGUF
    if file.suffix != _TENSORS:
        return None
    shapes = _shapes_in(file)
    told = other_tensors(shapes)
    if told is None and any("lora_A" in key for key in shapes):
        return _NO_CONFIG
    return told


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a safetensors file by name, from its header alone; none where it is broken."""
    from loradeploy.adapter.tensors import map_tensors

    try:
        if file.stat().st_size < 8:
            return {}
        tensors, _ = map_tensors(file, error=LoraDeployError)
    except (LoraDeployError, OSError):
        return {}
    return {name: tensor.shape for name, tensor in tensors.items()}


def _adapters_inside(place: Path) -> list[str]:
    """Folders of `place` that are adapters of PEFT, in the order of their names."""
    try:
        return sorted(entry.name for entry in place.iterdir() if (entry / _CONFIG).is_file())
    except OSError:
        return []


def newest_checkpoint(folders: Iterable[str]) -> str | None:
    """The last of a trainer's checkpoint-N among `folders`, None where there is none."""
    steps = {
        int(found[1]): name
        for name in folders
        if (found := re.fullmatch(r"checkpoint-(\d+)", name))
    }
    return steps[max(steps)] if steps else None
