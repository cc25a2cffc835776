"""Executes a schedule on a model."""

from dicache.runtime.apply import apply
from dicache.runtime.cache import Cache, CacheError
from dicache.runtime.stats import Stats

__all__ = ["Cache", "CacheError", "Stats", "apply"]
