"""The ASGI application, the checks before it, and the server that runs it."""
