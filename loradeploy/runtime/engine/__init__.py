"""The engine: requests that come one by one, generated together, each with its own adapter."""
