"""Shares as percentages, the same in every report."""

from __future__ import annotations

import math


def share(value: float | None) -> str:
    """Format a share as a percentage; 100 % only if the share is exactly 1."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return "100 %" if value == 1 else f"{min(99.9, 100 * value):.1f} %"
