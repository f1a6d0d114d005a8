"""OpenVINO GenAI's side of bench_peers; runs in its environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from tools.bench_peers.requests import SCALING, Request, Tokens, measured
from tools.bench_serve.batches import one_adapter_a_batch
from tools.timing.alternate import Side, serve_worker

THREADS = 2


def options_of(precision: str) -> dict[str, Any]:
    """Return the options by which models are compiled."""
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": THREADS}
    if precision == "fp32":  # the default on some CPUs is bf16, which would not be comparable
        options["INFERENCE_PRECISION_HINT"] = "f32"
        options["KV_CACHE_PRECISION"] = "f32"
    return options


def scheduler_of(cache_gb: int) -> Any:
    """Return the scheduler's settings."""
    scheduler = openvino_genai.SchedulerConfig()
    # Its prefix cache does not distinguish adapters, and would skip prefills of repeated prompts.
    scheduler.enable_prefix_caching = False
    scheduler.cache_size = cache_gb
    return scheduler


def adapters_of(paths: Sequence[str]) -> dict[str, Any]:
    """Load the adapters in PEFT directories, by path."""
    return {
        path: openvino_genai.Adapter(str(Path(path) / "adapter_model.safetensors"))
        for path in paths
    }


class OpenVino:
    """OpenVINO's pipeline, with one adapter for all rows of a call."""

    def __init__(self, model: str, adapters: Sequence[str], scaling: float, precision: str) -> None:
        self._adapters = adapters_of(adapters)
        every = openvino_genai.AdapterConfig([(one, scaling) for one in self._adapters.values()])
        self._pipeline = openvino_genai.LLMPipeline(
            model,
            "CPU",
            adapters=every,
            scheduler_config=scheduler_of(1),
            **options_of(precision),
        )
        self._by_name: dict[str | None, Any] = {None: openvino_genai.AdapterConfig()}

    def load(self, name: str, directory: str, scaling: float) -> None:
        """Name an adapter; the pipeline has loaded all of them at its start."""
        adapter = self._adapters[directory]
        self._by_name[name] = openvino_genai.AdapterConfig(adapter, scaling)

    def generate(self, rows: Sequence[Request], new: int) -> list[Tokens]:
        """Generate row by row, since a batch has one adapter."""
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


class OpenVinoBatches:
    """OpenVINO's continuous batching, with one adapter for all requests at a time."""

    def __init__(
        self, model: str, adapters: Mapping[str, str], scaling: float, precision: str
    ) -> None:
        known = adapters_of(list(adapters.values()))
        every = openvino_genai.AdapterConfig([(one, scaling) for one in known.values()])
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler_of(1), "CPU", {"adapters": every, **options_of(precision)}
        )
        self._by_name = {
            name: openvino_genai.AdapterConfig(known[path], scaling)
            for name, path in adapters.items()
        }

    def generate(self, prompts: Sequence[Tokens], adapter: str, new: int) -> list[Tokens]:
        """Generate after all prompts at once."""
        config = self._pipeline.get_config()
        config.max_new_tokens = config.min_new_tokens = new
        config.do_sample = False
        config.adapters = self._by_name[adapter]
        rows = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        found = self._pipeline.generate(rows, [config] * len(rows))
        return [list(map(int, one.m_generation_ids[0])) for one in found]


def openvino_genai_side(
    model: str, precision: str, adapters: dict[str, str], scaling: float, prompts: Any, **_: Any
) -> Side:
    """Measure all figures of OpenVINO GenAI."""
    peer = OpenVino(model, list(adapters.values()), scaling, precision)
    return measured(peer, prompts, adapters, scaling)


def openvino_requests(
    model: str,
    precision: str,
    adapters: Mapping[str, str],
    prompts: list[list[Tokens]],
    asked: list[list[str]],
    tokens: int,
    **_: Any,
) -> Side:
    """Run all requests of bench_serve's clients."""
    peer = OpenVinoBatches(model, adapters, SCALING, precision)
    return one_adapter_a_batch(peer.generate, prompts, asked, tokens)


if __name__ == "__main__":
    serve_worker({"figures": openvino_genai_side, "requests": openvino_requests}, warm_up=1)
