"""What the tools run on: models, adapters and texts, real and made up."""
