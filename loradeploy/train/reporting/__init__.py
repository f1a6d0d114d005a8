"""Progress of a training run, its loss curve, and the model card of the adapter."""
