"""`Stacks` under its public name; it is one of the modules of `loradeploy.runtime.adapters`."""

from loradeploy.runtime.adapters.stacks import Stacks

__all__ = ["Stacks"]
