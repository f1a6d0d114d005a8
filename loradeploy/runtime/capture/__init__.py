"""Runs that a device records once and replays: everything that they read and write stays put."""
