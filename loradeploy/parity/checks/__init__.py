"""The runs of a check: every backend, the reference a second time, and negative controls."""
