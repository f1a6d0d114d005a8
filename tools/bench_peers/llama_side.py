"""llama.cpp's side of bench_peers, by llama-cpp-python's bindings; runs in its environment."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp as ll
import numpy as np

from tools.bench_peers.requests import SCALING, Request, Tokens, measured
from tools.bench_serve.batches import one_adapter_a_batch
from tools.timing.alternate import Side, serve_worker

THREADS = 2
CONTEXT = 1280
_QUIET = ll.llama_log_callback(lambda *_: None)


class Llama:
    """llama.cpp; all tokens of a call have the same adapter, which is set for each request."""

    def __init__(self, model: str, precision: str, rows: int = 1) -> None:
        ll.llama_log_set(_QUIET, ctypes.c_void_p(0))
        ll.llama_backend_init()
        self._model = ll.llama_model_load_from_file(model.encode(), ll.llama_model_default_params())
        settings = ll.llama_context_default_params()
        settings.n_ctx = settings.n_batch = CONTEXT
        settings.n_seq_max = rows
        settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = THREADS
        if precision == "fp32":  # the default cache is fp16, which would not be comparable
            settings.type_k = settings.type_v = ll.GGML_TYPE_F32
        self._context = ll.llama_init_from_model(self._model, settings)
        vocabulary = ll.llama_model_get_vocab(self._model)
        self._size = ll.llama_vocab_n_tokens(vocabulary)
        self._ends = [
            token for token in range(self._size) if ll.llama_vocab_is_eog(vocabulary, token)
        ]
        self._adapters: dict[str, tuple[Any, float]] = {}

    def load(self, name: str, directory: str, scaling: float) -> None:
        """Load the adapter as a GGUF file, which has the scaling."""
        adapter = ll.llama_adapter_lora_init(self._model, directory.encode())
        if not adapter:
            raise SystemExit(f"llama.cpp does not read {directory}")
        self._adapters[name] = (adapter, 1.0)

    def generate(self, rows: Sequence[Request], new: int) -> list[Tokens]:
        """Generate row by row, since a batch has one adapter."""
        return [self._one(prompt, adapter, new) for prompt, adapter in rows]

    def _one(self, prompt: Tokens, adapter: str | None, new: int) -> Tokens:
        ll.llama_memory_clear(ll.llama_get_memory(self._context), True)
        self._use(adapter)
        tokens: Tokens = []
        given = prompt
        while True:
            array = (ll.llama_token * len(given))(*given)
            if ll.llama_decode(self._context, ll.llama_batch_get_one(array, len(given))):
                raise SystemExit("llama.cpp could not decode")
            tokens.append(self._best(-1))
            if len(tokens) == new:
                return tokens
            given = tokens[-1:]

    def batch(self, prompts: Sequence[Tokens], adapter: str, new: int) -> list[Tokens]:
        """Generate after all prompts in one batch; each is a sequence of the context."""
        ll.llama_memory_clear(ll.llama_get_memory(self._context), True)
        self._use(adapter)
        texts: list[Tokens] = [[] for _ in prompts]
        given = [list(prompt) for prompt in prompts]
        places = [0] * len(prompts)
        for _ in range(new):
            batch = ll.llama_batch_init(sum(map(len, given)), 0, 1)
            last = []
            for row, tokens in enumerate(given):
                for token in tokens:
                    at = batch.n_tokens
                    batch.token[at], batch.pos[at] = token, places[row]
                    batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, row, 0
                    places[row] += 1
                    batch.n_tokens += 1
                batch.logits[batch.n_tokens - 1] = 1
                last.append(batch.n_tokens - 1)
            failed = ll.llama_decode(self._context, batch)
            ll.llama_batch_free(batch)
            if failed:
                raise SystemExit("llama.cpp could not decode")
            given = [[self._best(at)] for at in last]
            for text, tokens in zip(texts, given, strict=True):
                text += tokens
        return texts

    def _best(self, at: int) -> int:
        """Return the most likely token after a position of the last batch, except end tokens."""
        logits = np.ctypeslib.as_array(
            ll.llama_get_logits_ith(self._context, at), shape=(self._size,)
        )
        logits[self._ends] = -np.inf
        return int(logits.argmax())

    def _use(self, adapter: str | None) -> None:
        if adapter is None:
            ll.llama_set_adapters_lora(self._context, None, 0, None)
            return
        handle, scale = self._adapters[adapter]
        handles = (ll.llama_adapter_lora_p_ctypes * 1)(handle)
        scales = (ctypes.c_float * 1)(scale)
        ll.llama_set_adapters_lora(self._context, handles, 1, scales)


def llama_side(
    model: str, precision: str, adapters: Mapping[str, str], scaling: float, prompts: Any
) -> Side:
    """Measure all figures of llama.cpp."""
    return measured(Llama(model, precision), prompts, adapters, scaling)


def llama_requests(
    model: str,
    precision: str,
    adapters: Mapping[str, str],
    prompts: list[list[Tokens]],
    asked: list[list[str]],
    tokens: int,
    **_: Any,
) -> Side:
    """Run all requests of bench_serve's clients."""
    peer = Llama(model, precision, rows=sum(map(len, prompts)))
    for name, path in adapters.items():
        peer.load(name, path, SCALING)
    return one_adapter_a_batch(peer.batch, prompts, asked, tokens)


if __name__ == "__main__":
    serve_worker({"figures": llama_side, "requests": llama_requests}, warm_up=1)
