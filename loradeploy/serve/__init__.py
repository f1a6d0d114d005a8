"""A bundle as an HTTP service with the interface of OpenAI's API; needs the extra `serve`."""
