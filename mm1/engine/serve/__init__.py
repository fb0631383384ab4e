"""The HTTP server: OpenAI's API, sandboxed image decoding and a page for the browser."""
