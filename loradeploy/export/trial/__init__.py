"""Run a bundle before it is put in place, and compare it with its source."""
