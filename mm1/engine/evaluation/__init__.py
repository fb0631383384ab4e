"""Evaluate models: benchmarks, metrics and few-shot prompts."""
