"""What the rows of a batch have read: caches that grow, slots of one buffer, a source."""
