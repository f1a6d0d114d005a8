"""What a check runs: the backends, the reference a second time, mistakes made on purpose."""
