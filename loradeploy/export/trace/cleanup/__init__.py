"""Rewrite a traced graph: smaller, readable, and with operators that have kernels."""
