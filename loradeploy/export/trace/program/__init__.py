"""The exported program: of the first layers of a deep model, repeated, and lowered."""
