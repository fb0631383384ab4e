"""Read sources and media, make documents, mix and pack them. Only the batch and its users import torch."""
