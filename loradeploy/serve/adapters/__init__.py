"""Which adapters a service has: those of the bundle, of a directory, and of an object store."""
