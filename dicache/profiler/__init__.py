"""Measures a model: recorders, and the profile that they fill."""

from dicache.profiler.profiles import Profile, ProfileError, Provenance, Run

__all__ = ["Profile", "ProfileError", "Provenance", "Run"]
