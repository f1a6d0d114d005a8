"""Two models of anybody's compared as they are."""
