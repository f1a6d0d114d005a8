"""Run a bundle's graphs: check and convert the feeds, and bind them."""
