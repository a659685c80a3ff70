"""Getting at a model's modules."""
