"""The certificate of a bundle: what parity proved, what is required of it, who signed it."""
