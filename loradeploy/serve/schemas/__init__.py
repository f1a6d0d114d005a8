"""What requests and answers are, as pydantic models: the OpenAPI description comes from them."""
