"""Convert other projects' weights into checkpoints."""
