"""Data sources, images, documents, mixtures and packing; nothing here imports torch before the batch."""
