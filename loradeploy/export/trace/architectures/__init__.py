"""Steps of single architectures, in a form that can be traced for any batch and any length."""
