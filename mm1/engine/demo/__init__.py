"""Train a small model in minutes, and ask it about images that it has not seen."""
