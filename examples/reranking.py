"""Train an adapter that scores pairs of texts, deploy it, check parity, and rank documents.

    python examples/reranking.py MODEL DATA.jsonl OUTPUT --query "who won the cup?"

MODEL is an encoder, a Hugging Face directory or id; a line of DATA is
{"text": "who won the cup?", "text_pair": "The home side won the cup.", "label": ["relevant"]}, with
label [] if the document does not answer the query. The documents of DATA are ranked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import loradeploy as ld


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--query", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    adapter, bundle = arguments.output / "adapters" / "relevance", arguments.output / "bundle"
    rows = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines()]
    documents = sorted({row["text_pair"] for row in rows})

    trained = ld.train(
        arguments.model,
        arguments.data,
        adapter,
        task="sequence-classification",
        problem_type="multi-label",  # with a single label: a sigmoid for each pair
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
    )
    print(f"pair accuracy: {trained.accuracy_before:.2f} → {trained.accuracy_after:.2f}")

    ld.export(arguments.model, bundle, adapters={"relevance": adapter})
    report = ld.parity(
        bundle,
        model=arguments.model,
        backends=["onnx-side-inputs"],  # the one used for serving; without this line, all backends
        prompts=[(arguments.query, document) for document in documents[:8]],
        evaluate=arguments.data,  # use held-out data in practice
    )
    print(f"parity {'passed' if report.passed else 'FAILED'}")
    for score in report.scores:
        print(f"{score.title}: {score.metric} {score.value:.3f}, PyTorch {score.reference:.3f}")

    scorer = ld.TextPairScorer(ld.AdapterSession(bundle))
    for found in scorer.rerank(arguments.query, documents, "relevance", top_k=3):
        print(f"{found.score:.3f} {documents[found.index]}")


if __name__ == "__main__":
    main()
