"""Run one batch with a different adapter in each row, and compare it with single rows.

    python examples/mixed_batch.py BUNDLE "The prompt" [--max-new-tokens 16]

The base and every adapter of the bundle answer the prompt. The rows of the batch equal the same
prompts run one by one.
"""

from __future__ import annotations

import argparse

import loradeploy as ld


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    arguments = parser.parse_args()

    session = ld.AdapterSession(arguments.bundle)
    generator = ld.TextGenerator(session)
    rows = [None, *session.adapters]  # None is the base
    together = generator.generate(
        [arguments.prompt] * len(rows), rows, max_new_tokens=arguments.max_new_tokens
    )
    for name, answer in zip(rows, together, strict=True):
        (alone,) = generator.generate(
            [arguments.prompt], name, max_new_tokens=arguments.max_new_tokens
        )
        same = "as alone" if answer.token_ids == alone.token_ids else "NOT as alone"
        print(f"{name or 'base'} ({same}): {answer.text!r}")


if __name__ == "__main__":
    main()
