"""loradeploy's side of bench_peers: TextGenerator on a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import loradeploy as ld
from tools.bench_peers.requests import Request, Tokens, measured
from tools.timing.alternate import Side, serve_worker


class Ours:
    """A bundle whose adapters are loaded as in an application."""

    def __init__(self, bundle: str, operator: str | None) -> None:
        self._session = ld.AdapterSession(bundle, operator=operator)
        self._generator = ld.TextGenerator(self._session)
        # End tokens are excluded, so that every engine generates the same number of tokens.
        ends = self._session.texts.base.tokenizer.eos_ids
        self._barred: dict[int | str, float] = dict.fromkeys(ends, -100.0)

    def load(self, name: str, directory: str, scaling: float) -> None:
        """Load a PEFT directory; its config has the scaling."""
        self._session.load(name, directory)

    def generate(self, rows: Sequence[Request], new: int) -> list[Tokens]:
        """Generate all rows in one batch, each with its own adapter."""
        prompts, adapters = [list(prompt) for prompt, _ in rows], [name for _, name in rows]
        given = self._generator.generate(
            prompts, adapters, max_new_tokens=new, logit_bias=self._barred
        )
        return [list(one.token_ids) for one in given]


def loradeploy_side(
    bundle: str,
    adapters: dict[str, str],
    scaling: float,
    prompts: Any,
    operator: str | None = None,
) -> Side:
    """Measure all figures of one bundle, with the operators' library if one is given."""
    return measured(Ours(bundle, operator), prompts, adapters, scaling)


if __name__ == "__main__":
    serve_worker({"loradeploy": loradeploy_side}, warm_up=1)
