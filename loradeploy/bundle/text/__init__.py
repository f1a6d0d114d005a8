"""What text is to a model and its adapters: tokens, chat templates, generation, pooling."""
