"""Training backends: what distributes a model over ranks."""
