"""Executes a schedule on a model."""

from dicache.runtime.apply import apply
from dicache.runtime.cache import Cache
from dicache.runtime.errors import CacheError, CacheWarning
from dicache.runtime.stats import Stats

__all__ = ["Cache", "CacheError", "CacheWarning", "Stats", "apply"]
