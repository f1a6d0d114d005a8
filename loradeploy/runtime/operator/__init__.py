"""The operator loradeploy.LoraAdd for low-rank updates: build its library, and use it."""
