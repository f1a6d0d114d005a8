"""How the next token is chosen: samples and beams, their settings, and where a text ends."""
