"""Text inputs and outputs of models and adapters: tokens, chat templates, generation, pooling."""
