"""Train an adapter for vector search, deploy it, check parity, and search documents with it.

    python examples/embeddings.py MODEL DATA.jsonl OUTPUT --query "who won the cup?"

MODEL is a sentence encoder, a Hugging Face directory or id; a line of DATA is
{"anchor": "who won the cup?", "positive": "The home side won the cup."}, and may have a "negative".
The positives are the documents that are searched.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import loradeploy as ld


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--query", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    arguments = parser.parse_args()
    adapter, bundle = arguments.output / "adapters" / "search", arguments.output / "bundle"
    rows = [json.loads(line) for line in arguments.data.read_text().splitlines()]
    queries, documents = ([row[name] for row in rows] for name in ("anchor", "positive"))

    ld.train(
        arguments.model,
        arguments.data,
        adapter,
        task="feature-extraction",
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
    )
    ld.export(arguments.model, bundle, task="feature-extraction", adapters={"search": adapter})
    report = ld.parity(
        bundle,
        model=arguments.model,
        backends=["onnx-side-inputs"],  # the one used for serving; without this line, all backends
        prompts=[arguments.query],
    )
    print(f"parity {'passed' if report.passed else 'FAILED'}")

    embed = ld.TextEmbedder(ld.AdapterSession(bundle))
    # Use held-out queries in practice; these were trained on.
    for name in (None, "search"):
        # Cosines, since the vectors have length 1.
        scores = embed(queries, name) @ embed(documents, name).T
        own = np.diag(scores)[:, None]
        ranks = (scores > own).sum(axis=1) + 1  # the rank of each query's positive
        label = name or "base"
        print(f"{label}: recall@1 {(ranks == 1).mean():.3f}, MRR {(1 / ranks).mean():.3f}")

    scores = embed(documents, "search") @ embed([arguments.query], "search")[0]
    for number in scores.argsort()[::-1][:3]:
        print(f"{scores[number]:.3f} {documents[number]}")


if __name__ == "__main__":
    main()
