"""The laws of the runtime, checked on a model: by `dicache doctor` on yours, and by the tests on all of diffusers'."""

from dicache.conformance.laws import LAWS, LawError
from dicache.conformance.subject import Subject

__all__ = ["LAWS", "LawError", "Subject"]
