"""What the backends are fed."""
