"""Train an adapter, deploy it both ways, check the parity of both, and generate text.

    python examples/train_and_deploy.py MODEL DATA.jsonl OUTPUT [--steps 40]

MODEL is a Hugging Face directory or id; a line of DATA is {"prompt": …, "completion": …}.
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
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    adapter = arguments.output / "adapters" / "mine"
    bundle, merged = arguments.output / "bundle", arguments.output / "merged"

    trained = ld.train(arguments.model, arguments.data, adapter, rank=8, max_steps=arguments.steps)
    print(f"loss {trained.loss_before:.2f} → {trained.loss_after:.2f}")

    ld.export(arguments.model, bundle, adapters={"mine": adapter})
    ld.export(bundle, merged, adapters={"mine": adapter}, merge=True)  # seconds, without PyTorch

    for place in (bundle, merged):
        report = ld.parity(place, model=arguments.model, adapters={"mine": adapter})
        print(f"{place.name}: parity {'passed' if report.passed else 'FAILED'}")

    prompt = json.loads(arguments.data.read_text(encoding="utf-8").splitlines()[0])["prompt"]
    generator = ld.TextGenerator(ld.AdapterSession(bundle))
    for name in (None, "mine"):
        (answer,) = generator.generate([prompt], name, max_new_tokens=16)
        print(f"{name or 'base'}: {answer.text!r}")


if __name__ == "__main__":
    main()
