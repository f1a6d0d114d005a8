"""Plan nodes that serve adapters, by a simulation on measured figures (docs/scaling.md)."""
