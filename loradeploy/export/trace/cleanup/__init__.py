"""A traced graph rewritten: small, readable, and with the operators that kernels are for."""
