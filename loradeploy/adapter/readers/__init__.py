"""Read adapters of other libraries: one module per library, and the `table` that selects it."""
