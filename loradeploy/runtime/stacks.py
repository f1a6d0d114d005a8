"""Public name of the stacks of the default layout, rows."""

from loradeploy.runtime.adapters.row_stacks import RowStacks as Stacks

__all__ = ["Stacks"]
