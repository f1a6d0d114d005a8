"""OpenVINO GenAI's side of bench_peers, for its own environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from tools.alternate import Side, serve_worker
from tools.bench_peers.requests import Request, Tokens, measured

THREADS = 2


class OpenVino:
    """Its pipeline, which takes one adapter for all rows of a call."""

    def __init__(self, model: str, adapters: Sequence[str], scaling: float, precision: str) -> None:
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": THREADS}
        if precision == "fp32":  # the CPU's bf16 otherwise, which is other work
            options["INFERENCE_PRECISION_HINT"] = "f32"
            options["KV_CACHE_PRECISION"] = "f32"
        scheduler = openvino_genai.SchedulerConfig()
        # Its cache of prefixes does not know adapters apart, and would read no prompt twice.
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 1
        self._adapters = {
            path: openvino_genai.Adapter(str(Path(path) / "adapter_model.safetensors"))
            for path in adapters
        }
        every = openvino_genai.AdapterConfig([(one, scaling) for one in self._adapters.values()])
        self._pipeline = openvino_genai.LLMPipeline(
            model, "CPU", adapters=every, scheduler_config=scheduler, **options
        )
        self._by_name: dict[str | None, Any] = {None: openvino_genai.AdapterConfig()}

    def load(self, name: str, directory: str, scaling: float) -> None:
        """Name an adapter: the pipeline knows all of them from the start."""
        adapter = self._adapters[directory]
        self._by_name[name] = openvino_genai.AdapterConfig(adapter, scaling)

    def generate(self, rows: Sequence[Request], new: int) -> list[Tokens]:
        """One after another: a batch has one adapter."""
        return [self._one(prompt, adapter, new) for prompt, adapter in rows]

    def _one(self, prompt: Tokens, adapter: str | None, new: int) -> Tokens:
        given = self._pipeline.generate(
            openvino.Tensor(np.array([prompt], np.int64)),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            adapters=self._by_name[adapter],
        )
        return [int(token) for token in given.tokens[0]]


def openvino_genai_side(
    model: str, precision: str, adapters: dict[str, str], scaling: float, prompts: Any, **_: Any
) -> Side:
    """All figures of OpenVINO GenAI."""
    peer = OpenVino(model, list(adapters.values()), scaling, precision)
    return measured(peer, prompts, adapters, scaling)


if __name__ == "__main__":
    serve_worker({"openvino": openvino_genai_side}, warm_up=1)
