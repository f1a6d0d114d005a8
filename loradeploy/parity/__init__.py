"""Backends compared with each other, and the verdict."""
