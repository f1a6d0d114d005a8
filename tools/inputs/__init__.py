"""Inputs of the tools: models, adapters and texts, real or randomly generated."""
