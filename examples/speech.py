"""Train an adapter of Whisper, deploy it, prove it, and transcribe a WAV file with it.

    python examples/speech.py MODEL DATA.jsonl OUTPUT --audio visit.wav

MODEL is a Whisper, a Hugging Face directory or id; a line of DATA is
{"audio": "clips/1.wav", "target": "The patient was seen on Monday.", "language": "en"}.
With jiwer installed, the word error rates of the data are printed too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import loradeploy as ld


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--audio", required=True)
    parser.add_argument("--language", default="en")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    adapter, bundle = arguments.output / "adapters" / "clinic", arguments.output / "bundle"

    trained = ld.train(
        arguments.model,
        arguments.data,
        adapter,
        task="seq2seq-lm",
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
    )
    print(f"loss: {trained.loss_before:.2f} → {trained.loss_after:.2f}")

    ld.export(arguments.model, bundle, adapters={"clinic": adapter})
    report = ld.parity(
        bundle,
        model=arguments.model,
        backends=["onnx-side-inputs"],  # what is served; all of them without this line
    )
    print(f"parity {'passed' if report.passed else 'FAILED'}")

    recognizer = ld.SpeechRecognizer(ld.AdapterSession(bundle))
    sounds = [arguments.audio] * 2
    for heard in recognizer.transcribe(sounds, [None, "clinic"], language=arguments.language):
        print(f"{heard.adapter or 'base'}: {heard.text.strip()}")

    if importlib.util.find_spec("jiwer"):
        import jiwer

        # Held-out data would tell more than the data that was trained on.
        rows = [json.loads(line) for line in arguments.data.read_text().splitlines()]
        files = [arguments.data.parent / row["audio"] for row in rows]
        for name in (None, "clinic"):
            found = recognizer.transcribe(files, name, language=arguments.language)
            rate = jiwer.wer([row["target"] for row in rows], [heard.text for heard in found])
            print(f"word error rate of {name or 'the base'}: {rate:.2f}")


if __name__ == "__main__":
    main()
