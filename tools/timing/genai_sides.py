"""onnxruntime-genai's sides of bench_runtime and bench_serve; runs in its environment."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping
from typing import Any

import onnxruntime_genai as og

from tools.bench_serve.load import of_run
from tools.timing.alternate import WARM_UP, Side, serve_worker


def genai_base(bundle: str, past: int, **_: Any) -> Side:
    """Return a decode step of one token after `past` tokens, without an adapter."""
    return _step(og.Model(bundle), past, None)


def genai_one(bundle: str, native: str, past: int, **_: Any) -> Side:
    """Like `genai_base`, with the adapter in the .onnx_adapter file `native`."""
    return _step(og.Model(bundle), past, native)


def _step(model: Any, past: int, native: str | None) -> Side:
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=past + 8)
    generator = og.Generator(model, parameters)
    if native is not None:
        adapters = og.Adapters(model)
        adapters.load(native, "one")
        generator.set_active_adapter(adapters, "one")
    generator.append_tokens([1] * past)

    def call() -> None:
        generator.append_tokens([1])
        generator.rewind_to(past)

    return call


def genai_requests(
    bundle: str,
    adapters: Mapping[str, str],
    prompts: list[list[list[int]]],
    asked: list[list[str]],
    tokens: int,
    **_: Any,
) -> Side:
    """Return a run of all clients' requests, one after another, with `tokens` tokens each."""
    model = og.Model(bundle)
    tokenizer = og.Tokenizer(model)
    loaded = og.Adapters(model)
    for name, native in adapters.items():
        loaded.load(native, name)

    runs = itertools.count()

    def call() -> dict[str, Any]:
        first: list[float] = []
        between: list[float] = []
        texts: list[str] = []
        run = next(runs)
        began, used = time.perf_counter(), time.process_time()
        for own, names in zip(prompts, asked, strict=True):
            for prompt, name in zip(own, names, strict=True):
                last = time.perf_counter()
                parameters = og.GeneratorParams(model)
                length = len(prompt) + tokens
                # End tokens are suppressed, so that every side generates the same number.
                parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
                generator = og.Generator(model, parameters)
                generator.set_active_adapter(loaded, name)
                generator.append_tokens(of_run(prompt, run))
                for number in range(tokens):
                    generator.generate_next_token()
                    now = time.perf_counter()
                    (between if number else first).append(now - last)
                    last = now
                texts.append(tokenizer.decode(generator.get_sequence(0)[len(prompt) :]))
        made = tokens * len(texts)
        return {
            "speed": made / (time.perf_counter() - began),
            "economy": made / (time.process_time() - used),
            "first": first,
            "between": between,
            "texts": texts,
        }

    return call


if __name__ == "__main__":
    serve_worker(
        {
            "genai_requests": genai_requests,
            "genai_base": genai_base,
            "genai_one": genai_one,
            "genai_built": genai_base,  # on the model builder's graph
            "genai_lora": genai_base,  # on the model builder's graph with an adapter in it
        },
        warm_up=1 if "genai_requests" in sys.argv else WARM_UP,
    )
