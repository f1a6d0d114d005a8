"""Tests of `loradeploy.serve`: real servers on free ports, real clients."""
