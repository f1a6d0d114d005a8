"""A program for the interpreter that has onnxruntime-genai: it computes the logits of tokens.

    python genai_worker.py BUNDLE FILE [NAME=ADAPTER.onnx_adapter]…

It needs numpy and onnxruntime_genai, but not loradeploy. Each line of stdin is a JSON object,
{"tokens": [id, …], "first": bool, "adapter": NAME or null, "room": int}: if `first`, the tokens
start a new sequence of at most `room` tokens, with or without an adapter; otherwise they continue
the current one. For each line it writes the logits of these tokens, [tokens, vocabulary], to FILE
(.npy) and prints a JSON line, {"tokens": count} or {"error": one line}. The line {"tokens": 0} is
printed once when the bundle is open.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

import numpy as np
import onnxruntime_genai as og


def main(bundle: str, file: str, *named: str) -> None:
    """Answer the lines of stdin until they end."""
    answers = _claim_stdout()
    model = og.Model(bundle)
    adapters = og.Adapters(model)
    for entry in named:
        name, _, path = entry.partition("=")
        adapters.load(path, name)
    generator: Any = None
    _say(answers, tokens=0)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["first"]:
                del generator  # frees its cache before the next one is allocated
                generator = _start(model, adapters, request["adapter"], request["room"])
            generator.append_tokens(np.array(request["tokens"], np.int32))
            logits = np.asarray(generator.get_output("logits"))[0]  # [tokens, vocabulary]
            np.save(file, logits)
        except Exception as problem:  # this sequence failed; the next one may succeed
            generator = None
            _say(answers, error=f"{type(problem).__name__}: {problem}".splitlines()[0])
            continue
        _say(answers, tokens=len(logits))


def _start(model: Any, adapters: Any, adapter: str | None, room: int) -> Any:
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=room, do_sample=False)
    generator = og.Generator(model, parameters)
    if adapter is not None:
        generator.set_active_adapter(adapters, adapter)
    return generator


def _claim_stdout() -> TextIO:
    """Return stdout for the answers only; what the library prints goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, **answer: object) -> None:
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
