"""How well a deployment does its task on held-out data."""
