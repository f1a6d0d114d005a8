"""A bundle's files, read as one bundle and opened as a graph that is as its manifest says."""
