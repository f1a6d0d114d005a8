"""The adapters of a service: of the bundle, of a directory, and of an object store."""
