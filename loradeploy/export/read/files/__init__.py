"""Choose the base model among files, and read the config beside its graph."""
