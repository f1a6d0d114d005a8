"""Fuzzers of all readers: mutate valid files and read them."""
