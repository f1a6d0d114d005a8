"""The certificate of a bundle: what the parity check covered, requirements, and signatures."""
