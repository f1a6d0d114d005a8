"""Serve a bundle over HTTP with the interface of OpenAI's API; needs the extra `serve`."""
