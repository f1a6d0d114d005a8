"""Caches of the rows of a batch: growing caches, slots of one buffer, an encoder's source."""
