"""The order of training examples, where it is not the Trainer's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ByLength(LengthGroupedSampler):  # type: ignore[misc]
    """Batches of examples of like length, in an order that `seed` and the epoch decide.

    transformers' own draws from the global random state, so that a run that is taken up again in
    the middle of an epoch would go on in another order (5.23).
    """

    def __init__(self, examples: Sequence[dict[str, Any]], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=[len(example["input_ids"]) for example in examples])
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin the order of `epoch`; accelerate calls it."""
        self.generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
