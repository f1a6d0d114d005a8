"""Build a bundle's content: the base graph with a merged adapter, or with side inputs."""
