"""Parts of a model computed in few passes over memory, for training on a CPU."""
