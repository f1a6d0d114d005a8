"""torchtune's LoRA recipe as a side of the training benchmark, in an environment of its own.

    python3 -m venv VENV
    VENV/bin/pip install torch==2.13.0 torchtune==0.6.1 torchao==0.13.0

torchtune's Llama 3 builder with LoRA, its padded batches and its cross-entropy of chunks of logits,
without recomputing activations. The adapter, the batches, the optimizer and the schedule are those
of the other sides. This module imports nothing that such an environment lacks.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tools.timing.alternate import Side, serve_worker

_IGNORED: Final = -100


def torchtune(
    base: str,
    adapter: str,
    examples: str,
    record: str,
    batch: int,
    steps: int,
    learning_rate: float,
    **_: Any,
) -> Side:
    """`examples`: a JSON file of the examples of all steps, in order."""
    import torch
    from torch.nn.utils import clip_grad_norm_
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    model = _model(Path(base), Path(adapter))
    features = json.loads(Path(examples).read_text(encoding="utf-8"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    loss_of = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_of.num_output_chunks)
    model.train()
    losses: list[float] = []
    start = time.process_time()

    def call() -> None:
        rows = features[batch * len(losses) : batch * (len(losses) + 1)]
        tokens, labels = _padded(rows)
        loss = loss_of(model(tokens), labels)
        loss.backward()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
        found = {"losses": losses, "peak_bytes": peak, "start_seconds": start}
        Path(record).write_text(json.dumps(found), encoding="utf-8")

    return call


def _model(base: Path, adapter: Path) -> Any:
    from safetensors.torch import load_file
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama3._component_builders import lora_llama3
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    lora = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"]
    model = lora_llama3(
        ["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        embed_dim=width,
        max_seq_len=config["max_position_embeddings"],
        intermediate_dim=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        rope_base=config["rope_parameters"]["rope_theta"],
        lora_rank=lora["r"],
        lora_alpha=lora["lora_alpha"],
    )
    weights = load_file(base / "model.safetensors")
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    state = hf_to_tune(weights, heads, kv_heads, width)
    state |= _adapter_weights(load_file(adapter / "adapter_model.safetensors"), heads, kv_heads)
    model.load_state_dict(state)
    set_trainable_params(model, get_adapter_params(model))
    return model


_NAMES: Final = {
    "self_attn": "attn",
    "o_proj": "output_proj",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "lora_A": "lora_a",
    "lora_B": "lora_b",
}


def _adapter_weights(weights: Mapping[str, Any], heads: int, kv_heads: int) -> dict[str, Any]:
    """PEFT's weights by torchtune's names, B of q and k in torchtune's order of rotary pairs."""
    found = {}
    for key, value in weights.items():
        path = key.removeprefix("base_model.model.model.").split(".")
        for projection, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if projection in path and "lora_B" in path:
                pairs = value.view(count, 2, -1, value.shape[1]).transpose(1, 2)
                value = pairs.reshape(value.shape)
        found[".".join(_NAMES.get(part, part) for part in path)] = value
    return found


def _padded(rows: Sequence[Mapping[str, list[int]]]) -> tuple[Any, Any]:
    """Tokens, and the label of each position: the token after it. int64 [batch, longest]."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), _IGNORED)
    for number, row in enumerate(rows):
        size = len(row["input_ids"])
        tokens[number, :size] = torch.tensor(row["input_ids"])
        labels[number, : size - 1] = torch.tensor(row["labels"][1:])
    return tokens, labels


if __name__ == "__main__":
    serve_worker({"torchtune": torchtune})
