"""Public name of `loradeploy.runtime.adapters.stacks.Stacks`."""

from loradeploy.runtime.adapters.stacks import Stacks

__all__ = ["Stacks"]
