"""Train an adapter for Whisper, deploy it, check parity, and transcribe a WAV file.

    python examples/speech.py MODEL DATA.jsonl OUTPUT --audio visit.wav

MODEL is a Whisper model, a Hugging Face directory or id; a line of DATA is
{"audio": "clips/1.wav", "target": "The patient was seen on Monday.", "language": "en"}.
The word error rate is computed with jiwer.
"""

from __future__ import annotations

import argparse
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
    # Use held-out data in practice; this is the training data.
    report = ld.parity(
        bundle,
        model=arguments.model,
        backends=["onnx-side-inputs"],  # the one used for serving; without this line, all backends
        evaluate=arguments.data,
    )
    print(f"parity {'passed' if report.passed else 'FAILED'}")
    for score in report.scores:
        name = score.adapter or "base"
        print(f"{score.metric} of {name}: {score.value:.2f}, PyTorch {score.reference:.2f}")

    recognizer = ld.SpeechRecognizer(ld.AdapterSession(bundle))
    sounds = [arguments.audio] * 2
    for transcript in recognizer.transcribe(sounds, [None, "clinic"], language=arguments.language):
        print(f"{transcript.adapter or 'base'}: {transcript.text.strip()}")


if __name__ == "__main__":
    main()
