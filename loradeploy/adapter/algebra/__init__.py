"""Computing with adapters as data: updates, combinations, lower ranks, experts."""
