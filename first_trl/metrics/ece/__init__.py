"""Expected calibration error as an `evaluate` module, and the Space folder that publishes it."""

from .publish import build_space_folder


__all__ = ["build_space_folder"]
