"""Swap adapters with plain ONNX Runtime, without importing loradeploy.

    python examples/swap_adapters.py BUNDLE "The prompt" [--max-new-tokens 24]

The same calls exist in ONNX Runtime's C, C++, C# and Java interfaces: a session on model.onnx,
an adapter loaded from adapters/NAME.onnx_adapter, and run options that make it the active one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tokenizers


def empty_cache(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """Return an empty cache for one row."""
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), dtypes[i.type])
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }


def generate(
    session: onnxruntime.InferenceSession,
    prompt: list[int],
    adapter: onnxruntime.LoraAdapter | None,
    *,
    max_new_tokens: int,
    stop: set[int],
) -> list[int]:
    """Generate tokens greedily after `prompt`, with `adapter` active, or None for the base."""
    options = onnxruntime.RunOptions()
    if adapter is not None:
        options.add_active_adapter(adapter)
    outputs = [o.name for o in session.get_outputs()]
    cache, new, seen = empty_cache(session), list(prompt), 0
    generated: list[int] = []
    while len(generated) < max_new_tokens:
        feeds = {
            "input_ids": np.array([new], np.int64),
            "attention_mask": np.ones((1, seen + len(new)), np.int64),
            "position_ids": np.arange(seen, seen + len(new), dtype=np.int64)[np.newaxis],
        }
        results = dict(zip(outputs, session.run(outputs, {**feeds, **cache}, options), strict=True))
        seen += len(new)
        new = [int(results["logits"][0, -1].argmax())]
        if new[0] in stop:
            break
        generated += new
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
    return generated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # hides one warning per side input when the model is loaded
    session = onnxruntime.InferenceSession(
        arguments.bundle / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(arguments.bundle / "tokenizer.json"))
    config = json.loads((arguments.bundle / "generation_config.json").read_text())
    eos = config.get("eos_token_id")
    stop = set(eos if isinstance(eos, list) else [eos])

    files: list[Path | None] = [None, *sorted(arguments.bundle.glob("adapters/*.onnx_adapter"))]
    for file in files:
        adapter = None
        if file is not None:
            adapter = onnxruntime.LoraAdapter()
            adapter.Load(str(file))
        tokens = generate(
            session,
            tokenizer.encode(arguments.prompt).ids,
            adapter,
            max_new_tokens=arguments.max_new_tokens,
            stop=stop,
        )
        print(f"{file.stem if file else 'base'}: {tokenizer.decode(tokens)!r}")


if __name__ == "__main__":
    main()
