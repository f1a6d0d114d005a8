"""onnxruntime-genai's sides of bench_runtime, for its own environment."""

from __future__ import annotations

from typing import Any

import onnxruntime_genai as og

from tools.alternate import Side, serve_worker


def genai_base(bundle: str, past: int, **_: Any) -> Side:
    """A decode step of one token after `past`, without an adapter."""
    return _step(og.Model(bundle), past, None)


def genai_one(bundle: str, native: str, past: int, **_: Any) -> Side:
    """The same with the adapter in the .onnx_adapter file `native`."""
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


if __name__ == "__main__":
    serve_worker(
        {
            "genai_base": genai_base,
            "genai_one": genai_one,
            "genai_built": genai_base,  # of the builder's own graph
            "genai_lora": genai_base,  # of the builder's graph with an adapter in it
        }
    )
