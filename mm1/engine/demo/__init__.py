"""The demo: train a small model in minutes and ask it about images it has not seen."""
