"""Error metrics of two arrays, and their tolerances."""
