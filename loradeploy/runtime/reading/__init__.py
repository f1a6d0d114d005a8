"""Read a bundle's files in one consistent state, and open its graph, checked by its manifest."""
