"""The report of a check, and its output as tables and files."""
