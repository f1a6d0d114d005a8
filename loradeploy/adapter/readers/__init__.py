"""Read adapters of other libraries: `table` has a row for each form, the others its equation."""
