"""An adapter against a base model: what fits, what is a copy, what belongs to another part."""
