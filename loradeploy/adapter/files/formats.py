"""Recognize adapters of other libraries by their content, and suggest what to do with them.

Messages continue a sentence that begins with the path ("… is an adapter of mlx-lm: fuse it …").
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.files.keys import DELTA
from loradeploy.errors import AdapterError, LoraDeployError, listed_names, shortened
from loradeploy.files import open_file, read_json
from loradeploy.names import ADAPTER_CONFIG_NAME, MODEL_CONFIG_NAME

_TENSORS: Final = ".safetensors"

_CONVERT: Final = "convert it with loradeploy convert ADAPTER --output DIR"


@dataclass(frozen=True)
class Form:
    """The form of another library's adapter. `message`: what it is and what to do with it."""

    message: str


MLX: Final = Form(f"is an adapter of mlx-lm (lora_a, lora_b), not of PEFT: {_CONVERT}")
MLX_VISION: Final = Form(f"is an adapter of mlx-vlm (A, B), not of PEFT: {_CONVERT}")
KOHYA: Final = Form(
    "is an adapter of kohya's sd-scripts (lora_down, lora_up): convert that of a text encoder with"
    " loradeploy convert ADAPTER --model BASE --output DIR; for a diffusion model, which is not"
    " exported here, fuse it with diffusers (load_lora_weights, fuse_lora) and export that"
)
DIFFUSERS: Final = Form(
    "is an adapter of diffusers: convert that of a text encoder with loradeploy convert; for a"
    " diffusion model, which is not exported here, fuse it with diffusers (load_lora_weights,"
    " fuse_lora) and export that"
)
TORCHTUNE: Final = Form(
    "is an adapter with torchtune's names (lora_a.weight, lora_b.weight): convert it with"
    " loradeploy convert ADAPTER --model BASE --output DIR"
)
LITGPT: Final = Form(
    "is an adapter of litgpt, not of PEFT: convert it with loradeploy convert ADAPTER --model BASE"
    " --output DIR"
)
ADAPTER_HUB: Final = Form(f"is a LoRA of AdapterHub's adapters library, not of PEFT: {_CONVERT}")
BOTTLENECK: Final = Form(
    "is an adapter of AdapterHub's adapters library, of layers between those of the base,"
    " which are not exported: train a LoRA with PEFT instead"
)
JINA: Final = Form(
    "has the adapters of jina-embeddings-v3, one of each task: convert one with loradeploy convert"
    " CHECKPOINT --name TASK --output DIR"
)
NAMED: Final = Form(
    "has the names of adapters in its keys, as a model's state_dict() does: convert one with"
    " loradeploy convert ADAPTER --name NAME --output DIR"
)
OLIVE: Final = Form(
    "is an adapter that Olive converted (PEFT's names, transposed factors): give the PEFT directory"
    f" that it was converted from, or {_CONVERT}"
)
GGUF: Final = Form(
    "is a GGUF file of llama.cpp, not an adapter of PEFT: give the PEFT directory that it was"
    " converted from, or convert it with loradeploy convert ADAPTER --model BASE --output DIR"
)
_NATIVE: Final = (
    "is an adapter for one ONNX graph: give the PEFT directory that it was made from, or convert it"
    " to one with loradeploy convert (--bundle BUNDLE if loradeploy wrote it)"
)
_WHOLE: Final = "is not an adapter but a complete model: export it as `model`"
_NO_CONFIG: Final = (
    "has LoRA factors and no adapter_config.json, which has their rank, alpha and targets:"
    " copy it from the directory of the original adapter"
)
_SHARDED: Final = (
    "has no adapter_model.safetensors but shards of it (adapter_model-00001-of-…): join them in one"
    ' file: python -c "import glob, safetensors.torch as s; s.save_file({k: v for f in'
    " glob.glob('adapter_model-*.safetensors') for k, v in s.load_file(f).items()},"
    " 'adapter_model.safetensors')\""
)
_SHARDS: Final = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")
_OF_DEEPSPEED: Final = (
    "has no adapter_model.safetensors but DeepSpeed's shards of it (global_step…): join them with"
    " the zero_to_fp32.py in the same directory"
)
_OF_FSDP: Final = (
    "has no adapter_model.safetensors but shards of a model that FSDP trained (.distcp): join them"
    " with accelerate merge-weights, or save the adapter with the state dict type"
    " FULL_STATE_DICT"
)
_LITGPT_PICKLE: Final = (
    "is a pickle of litgpt, which can run code and is refused. If you trust it, run"
    ' python -c "import torch, safetensors.torch as s; s.save_file('
    "torch.load('lit_model.pth.lora', weights_only=True)['model'], 'lora.safetensors')\", and"
    " loradeploy convert lora.safetensors --model BASE"
)
_NEMO: Final = (
    "is a checkpoint of NeMo, whose weights are pickles, which are refused: export it to PEFT with"
    " NeMo (in NeMo 2: nemo.collections.llm.export_ckpt with target hf-peft)"
)
# Names of pickles of other libraries, and what they are.
_PICKLED: Final = {"lit_model.pth.lora": _LITGPT_PICKLE, "*.nemo": _NEMO}
# The ends of names of scales and other parts of quantized weights, of compressed-tensors, FP8,
# GPTQ, Olive and bitsandbytes.
_QUANTIZED: Final = re.compile(
    r".*\.lora_(?:embedding_)?[AB]\.(?:\w*scales?(?:_inv|_2)?|qweight|qzeros|weight_packed"
    r"|quant\.\w+|weight\.(?:absmax|quant_map|nested_\w+|quant_state\..*))"
)
# Beginnings of the names of tensors of PEFT's other methods, by peft_type.
_OTHER_METHODS: Final = {
    "boft_": "BOFT",
    "c3a_": "C3A",
    "delora_": "DELORA",
    "fourierft_": "FOURIERFT",
    "gralora_": "GRALORA",
    "hada_": "LOHA",
    "hira_": "HIRA",
    "hra_": "HRA",
    "ia3_": "IA3",
    "ln_tuning_": "LN_TUNING",
    "lokr_": "LOKR",
    "miss_": "MISS",
    "oft_": "OFT",
    "randlora_": "RANDLORA",
    "road_": "ROAD",
    "shira_": "SHIRA",
    "vblora_": "VBLORA",
    "vera_": "VERA",
    "waveft_": "WAVEFT",
}
_OTHER_PART: Final = re.compile(rf".*\.({'|'.join(_OTHER_METHODS)})[^.]*(?:\.[^.]+)?")
_NAMED: Final = re.compile(
    r"\.lora_(?:embedding_)?[AB]\.(?!weight$|bias$|quant\.)(?P<name>[^.]+)(\.|$)"
)

# Keys of a LoRA of litgpt.
_LIT: Final = re.compile(r"(transformer\.h\.\d+\.(attn|mlp)\.\w+|lm_head)\.lora_[AB]")
# Keys of a LoRA of AdapterHub's library, and of jina-embeddings-v3's stacked adapters.
_LORAS: Final = re.compile(r"\.loras\.[^.]+\.lora_[AB]$")
_STACKED: Final = ".parametrizations.weight.0.lora_"

_DIFFUSED: Final = re.compile(
    r"(unet|text_encoder(_\d)?|transformer\.(single_)?transformer_blocks)\..*lora"
)

# The fields that torchtune writes for PEFT, and use_dora, which it omits.
_TUNE_FIELDS: Final = frozenset(
    {"base_model_name_or_path", "lora_alpha", "peft_type", "r", "target_modules", "use_dora"}
)
_TUNE_PICKLE: Final = "adapter_model.pt"
_MISORDERED: Final = (
    "is an export of torchtune, which misorders rows of query and key for Qwen models and of DoRA's"
    f" magnitude: save the {_TUNE_PICKLE} beside it as .safetensors in a directory of its own, with"
    " a copy of adapter_config.json, and run loradeploy convert DIR --model BASE"
)

# Files in which other programs save weights that they trained beside an adapter and load before it:
# LLaVA's projector, the embeddings and norms of LongLoRA, the added tokens of vLLM and LoRAX, the
# vision tower of ms-swift.
_BESIDE: Final = ("non_lora_trainables", "trainable_params", "new_embeddings", "vit")

# Values of peft_type for methods that learn inputs instead of weights: they cannot be merged.
_PROMPTS: Final = (
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"),
    *("P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"),
)


def other_peft_type(peft_type: object) -> str:
    """Advice for an adapter whose peft_type is not LORA."""
    if isinstance(peft_type, str) and peft_type.upper() == "LORA":
        return 'write "LORA", as PEFT does'
    if peft_type in _PROMPTS:
        return "it learns inputs, not weights, and cannot be exported: train a LoRA instead"
    if peft_type == "ALORA":
        return "it is active after some tokens only, which cannot be exported"
    if peft_type == "XLORA":
        return "it chooses between adapters for each token, which cannot be exported"
    return "merge it with PEFT (merge_and_unload) and export the merged model"


def other_config(values: Mapping[str, Any]) -> str | None:
    """Message for an adapter_config.json of another library, None if it may be PEFT's."""
    form = form_of_config(values)
    return None if form is None else form.message


def form_of(values: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]) -> Form | None:
    """The form of an adapter of another library, from its settings and tensors; else None."""
    form = form_of_tensors(shapes)
    if form is OLIVE and values is not None and "peft_type" in values:
        return None  # square products of a rank above the number of inputs
    return form or (None if values is None else form_of_config(values))


def form_of_config(values: Mapping[str, Any]) -> Form | None:
    """The form, other than PEFT's, whose adapter_config.json has these `values`; else None."""
    if "peft_type" in values:
        return None
    if "lora_parameters" in values or "fine_tune_type" in values:
        return MLX
    inner = values.get("config")
    kind = values.get("architecture") or (
        inner.get("architecture") if isinstance(inner, Mapping) else None
    )
    if kind is not None or (isinstance(inner, Mapping) and "model_name" in values):
        return ADAPTER_HUB if kind == "lora" else BOTTLENECK
    return None


def form_of_tensors(shapes: Mapping[str, tuple[int, ...]]) -> Form | None:
    """The form, other than PEFT's, whose tensors have these names; else None."""
    if any(key.startswith(("lora_unet_", "lora_te")) for key in shapes):
        return KOHYA
    if any(_STACKED in key for key in shapes):
        return JINA
    if any(key.endswith((".lora_a", ".lora_b")) for key in shapes):
        return MLX
    if any(_is_pair(key, shapes) for key in shapes):
        return MLX_VISION
    if any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in shapes):
        return TORCHTUNE
    if any(_LIT.fullmatch(key) for key in shapes):
        return LITGPT
    if any(_LORAS.search(key) for key in shapes):
        return ADAPTER_HUB
    if any(_DIFFUSED.match(key) for key in shapes):
        return DIFFUSERS
    if any(_NAMED.search(key) for key in shapes):
        return NAMED
    return OLIVE if _is_transposed(shapes) else None


def _is_transposed(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether factors with PEFT's names are [in, rank] and [rank, out].

    Square products fit PEFT's layout too, with a rank above the number of inputs.
    """
    ends = ".lora_A.weight", ".lora_B.weight"
    pairs = [
        (shape, shapes.get(key.removesuffix(ends[0]) + ends[1], ()))
        for key, shape in shapes.items()
        if key.endswith(ends[0])
    ]
    return bool(pairs) and all(
        len(a) == len(b) == 2 and a[1] == b[0] and a[0] > a[1] for a, b in pairs
    )


def _is_pair(key: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether `key` is M.A [in, rank], and the file has M.B [rank, out]."""
    module, _, half = key.rpartition(".")
    other = shapes.get(f"{module}.B", ())
    return half == "A" and len(shapes[key]) == len(other) == 2 and shapes[key][1] == other[0]


def other_tensors(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Message for tensors with these names that are not a complete PEFT adapter; else None."""
    empty = [key for key, shape in shapes.items() if 0 in shape]
    if empty:
        return (
            f"has {len(empty)} empty tensors of {len(shapes)} (first {shortened(empty[0])}):"
            " DeepSpeed ZeRO-3 saves empty tensors if it does not gather them. Save it again with"
            " stage3_gather_16bit_weights_on_model_save, or use zero_to_fp32.py"
        )
    if quantized := [key for key in shapes if _QUANTIZED.fullmatch(key)]:
        return (
            f"has quantized factors ({shortened(quantized[0])}): save the adapter in float32 or"
            " bfloat16"
        )
    if (form := form_of_tensors(shapes)) is NAMED:
        names = {found["name"] for key in shapes if (found := _NAMED.search(key))}
        return f"{NAMED.message} (the names are {listed_names(sorted(names), 3)})"
    if form is not None:
        return form.message
    others = ((key, found[1]) for key in shapes if (found := _OTHER_PART.fullmatch(key)))
    for key, beginning in others:
        method = _OTHER_METHODS[beginning]
        return (
            f"is an adapter of PEFT's method {method} ({shortened(key)}): write {method} as"
            f" peft_type in its {ADAPTER_CONFIG_NAME}, then {other_peft_type(method)}"
        )
    if shapes and not any("lora" in key.lower() or DELTA in key for key in shapes):
        return (
            f"has no LoRA factors but {len(shapes)} full weights (first"
            f" {shortened(next(iter(shapes)))}): if it is a fully trained model, give its directory"
            " as `model`"
        )
    return None


def misordered_export(
    directory: Path, values: Mapping[str, Any], keys: Iterable[str]
) -> str | None:
    """Message for an adapter with PEFT's names whose rows torchtune misordered; else None.

    `values`, `keys`: the contents of adapter_config.json and the names of the tensors. torchtune's
    export permutes B of query and key for every model, even if the model needs no permutation, and
    never permutes DoRA's magnitude. Only the other files in the directory distinguish such an
    adapter from one that PEFT saved.
    """
    if not values.keys() <= _TUNE_FIELDS or not (directory / _TUNE_PICKLE).is_file():
        return None
    rotary = [key for key in keys if ".q_proj." in key or ".k_proj." in key]
    names = [values.get("base_model_name_or_path")]
    with contextlib.suppress(AdapterError):  # torchtune copies the base's
        names.append(read_json(directory / MODEL_CONFIG_NAME, error=AdapterError).get("model_type"))
    qwen = any("qwen" in name.lower() for name in names if isinstance(name, str))
    dora = any("lora_magnitude_vector" in key for key in rotary)
    return _MISORDERED if dora or (qwen and rotary) else None


def trained_beside(directory: Path) -> str | None:
    """Message for a file with more trained weights beside an adapter, None if there is none.

    PEFT ignores these files, so that its results are not those of the training.
    """
    for file in sorted(directory.glob("*")):
        if file.name.partition(".")[0] in _BESIDE and file.is_file():
            return (
                f"has {file.name}, weights that were trained with the adapter and that PEFT does"
                " not load: put them into the base and export that with the adapter, or remove the"
                " file if the base has them already"
            )
    return None


def other_directory(directory: Path) -> str | None:
    """Message for a directory that is not a PEFT adapter, None if it is not recognized."""
    if inner := _adapters_inside(directory):
        newest = newest_checkpoint(inner)
        if newest is not None:
            return (
                f"is not an adapter itself but has {len(inner)} checkpoints of a training run: give"
                f" the newest, {directory / newest}"
            )
        if len(inner) == 1:
            only = directory / inner[0]
            return f"is not an adapter itself, but its folder {inner[0]} is: give {only}"
        several = listed_names(inner, 4)
        return f"is not an adapter itself but has {len(inner)} in folders: give one of {several}"
    peft = False
    if (directory / ADAPTER_CONFIG_NAME).is_file():
        with contextlib.suppress(AdapterError):
            values = read_json(directory / ADAPTER_CONFIG_NAME, error=AdapterError)
            if (found := other_config(values)) is not None:
                return found
            peft = True
    if any(directory.glob("head_config.json")) or any(directory.glob("pytorch_adapter.bin")):
        return other_config({"architecture": "unknown"})
    files = sorted(directory.glob(f"*{_TENSORS}"))
    if peft and any(_SHARDS.fullmatch(file.name) for file in files):
        return _SHARDED
    if any(form_of_tensors(_shapes_in(file)) == JINA for file in files):
        return JINA.message
    if (directory / MODEL_CONFIG_NAME).is_file() and (
        files or any(directory.glob("pytorch_model*.bin"))
    ):
        return _WHOLE
    for file in files:
        if (found := other_file(file)) == _NO_CONFIG and peft:
            return f"has {file.name} in place of adapter_model{_TENSORS}: rename it"
        if found is not None:
            return f"has {file.name}, which {found}"
    if any(directory.glob("*.gguf")):
        return GGUF.message
    if peft and any(directory.glob("global_step*")):
        return _OF_DEEPSPEED
    if peft and any(directory.glob("**/*.distcp")):
        return _OF_FSDP
    if any(directory.glob("adapters.npz")):
        return MLX.message
    for pattern, message in _PICKLED.items():
        if found_here := sorted(file.name for file in directory.glob(pattern)):
            return f"has {found_here[0]}, which {message}"
    if (directory / "context").is_dir() and any(directory.glob("weights/*.distcp")):
        return _NEMO
    return None


def other_file(file: Path) -> str | None:
    """Message for a file without adapter_config.json beside it, None if it is not recognized."""
    for pattern, message in _PICKLED.items():
        if file.match(pattern):
            return message
    with contextlib.suppress(OSError, AdapterError), open_file(file, error=AdapterError) as opened:
        if opened.read(4) == b"GGUF":
            return GGUF.message
    if file.suffix == ".onnx_adapter":
        return _NATIVE
    if file.suffix != _TENSORS:
        return None
    shapes = _shapes_in(file)
    found = other_tensors(shapes)
    if found is None and any("lora_A" in key for key in shapes):
        return _NO_CONFIG
    return found


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file; empty if it is invalid."""
    from loradeploy.adapter.files.tensors import map_tensors

    try:
        if file.stat().st_size < 8:
            return {}
        tensors, _ = map_tensors(file, error=LoraDeployError)
    except (LoraDeployError, OSError):
        return {}
    return {name: tensor.shape for name, tensor in tensors.items()}


def _adapters_inside(directory: Path) -> list[str]:
    """The folders of `directory` that are PEFT adapters, in name order."""
    try:
        return sorted(
            entry.name for entry in directory.iterdir() if (entry / ADAPTER_CONFIG_NAME).is_file()
        )
    except OSError:
        return []


def newest_checkpoint(folders: Iterable[str]) -> str | None:
    """The checkpoint-N with the highest N among `folders`, or None."""
    steps = {
        int(found[1]): name
        for name in folders
        if (found := re.fullmatch(r"checkpoint-(\d+)", name))
    }
    return steps[max(steps)] if steps else None
