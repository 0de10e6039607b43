"""Models: weights and tokenizer of a name or directory."""

from rlsys.models.catalogue import cache_directory, check_model_path, resolve_model

__all__ = ["cache_directory", "check_model_path", "resolve_model"]
