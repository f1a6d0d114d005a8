"""Passes for forms that clients and devices need: layout, branches, required inputs, shapes."""
