"""One run in several processes: `accelerate launch -m loradeploy train …`, or torchrun's.

Each process trains on its share of every batch; the main one alone writes, prints and asks.
"""

from __future__ import annotations

import os


def process_count() -> int:
    """How many processes train together, by what the launcher has set."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0
