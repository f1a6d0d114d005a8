"""The forms of a graph that clients and devices need: its layout, branches, inputs, shapes."""
