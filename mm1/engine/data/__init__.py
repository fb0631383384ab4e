"""Sources, media, documents, the mixture and packing. Only the batch and what uses it import torch."""
