"""Fuzzers of all that is read: valid files, broken in the ways that files are broken."""
