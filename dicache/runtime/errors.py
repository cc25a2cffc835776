"""What a cache complains with."""


class CacheError(RuntimeError):
    """The cache cannot be used this way."""


class CacheWarning(UserWarning):
    """The cache works, but not as it was meant."""
