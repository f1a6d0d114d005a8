"""Which node of a graph is which module of the checkpoint, and by what evidence."""
