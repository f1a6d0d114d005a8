"""Requests and responses as pydantic models, which define the OpenAPI description."""
