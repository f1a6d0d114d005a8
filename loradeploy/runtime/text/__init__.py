"""Texts and their tokens: settings of each adapter, padding, pieces of a stream."""
