"""A run of a bundle's graphs: what it is fed, what feeds must be, and what is bound for it."""
