"""Whether the files of a bundle are those that an export writes of the model and the adapters."""
