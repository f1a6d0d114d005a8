"""Tasks: text, labels and vectors from bundles, each row with its own adapter."""
