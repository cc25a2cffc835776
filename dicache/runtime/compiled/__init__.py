"""Replay whose rows are compiled, each to one graph."""

from dicache.runtime.compiled.adaptive import CompiledAdaptive
from dicache.runtime.compiled.replay import CompiledReplay
from dicache.runtime.compiled.settings import Compiling

__all__ = ["CompiledAdaptive", "CompiledReplay", "Compiling"]
