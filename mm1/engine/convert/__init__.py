"""Conversion of other projects' weights into checkpoints."""
