"""Versions of the libraries that a training runs on."""

from importlib.metadata import version


__version__ = "0.1.0"
VERSIONS = "versions.json"  # beside the log of a training
_LIBRARIES = ("trl", "transformers", "peft", "torch", "datasets")


def training_versions() -> dict[str, str]:
    """Library -> installed version, for cards and the records of a run."""
    return {"first_trl": __version__} | {name: version(name) for name in _LIBRARIES}
