"""Specifications of `loradeploy.serve`: real servers on a free port, real clients."""
