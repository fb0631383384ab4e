"""Inference: the engine that schedules requests, its cache, sampling and decoding."""
