"""Find, recognize, read and write the files of adapters and base models."""
