"""From an encoder's states to the vector of a text, as sentence-transformers has it."""
