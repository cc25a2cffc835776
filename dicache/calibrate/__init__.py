"""Turns a profile into a schedule: one file a method."""

from dicache.calibrate.methods import CalibrationError

__all__ = ["CalibrationError"]
