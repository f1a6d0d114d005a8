"""The command line: one thin click command per verb."""
