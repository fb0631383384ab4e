"""Evaluation: benchmarks, metrics and few-shot prompts."""
