"""Train an adapter to find entities, deploy it, check parity, and find entities in a text.

    python examples/ner.py MODEL DATA.jsonl OUTPUT --text "Marie Curie was born in Warsaw."

MODEL is an encoder, a Hugging Face directory or id; a line of DATA is
{"tokens": ["Marie", "Curie", "left", "."], "tags": ["B-PER", "I-PER", "O", "O"]}.
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
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    adapter, bundle = arguments.output / "adapters" / "ner", arguments.output / "bundle"

    trained = ld.train(
        arguments.model,
        arguments.data,
        adapter,
        task="token-classification",
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
    )
    print(f"tag accuracy: {trained.accuracy_before:.2f} → {trained.accuracy_after:.2f}")

    ld.export(arguments.model, bundle, adapters={"ner": adapter})
    # Use held-out data in practice; this is the training data.
    report = ld.parity(
        bundle,
        model=arguments.model,
        backends=["onnx-side-inputs"],  # the one used for serving; without this line, all backends
        prompts=[arguments.text],
        evaluate=arguments.data,
    )
    print(f"parity {'passed' if report.passed else 'FAILED'}")
    for score in report.scores:
        print(f"{score.title}: {score.metric} {score.value:.3f}, PyTorch {score.reference:.3f}")

    classify = ld.TokenClassifier(ld.AdapterSession(bundle))
    (found,) = classify(arguments.text, "ner")
    for entity in found.entities:
        words = arguments.text[entity.start : entity.end].strip()
        print(f"{entity.start}-{entity.end} {words}: {entity.label} ({entity.score:.2f})")


if __name__ == "__main__":
    main()
