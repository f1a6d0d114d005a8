"""A bundle's content: the base graph with an adapter merged, or with side inputs."""
