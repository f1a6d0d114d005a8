"""The application, what lets requests through to it, and the server that runs it."""
