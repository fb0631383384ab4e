"""Define what the engine asks of a model, the registry of models, and the models."""
