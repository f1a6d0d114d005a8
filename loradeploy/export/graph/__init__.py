"""Graphs as they are: read from files, run, changed in small steps."""
