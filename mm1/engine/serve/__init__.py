"""Serve models over HTTP: OpenAI's API, sandboxed image decoding and a page for the browser."""
