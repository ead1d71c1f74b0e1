"""Registrations of a test that are gone for the next ones."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from first_trl import plugins


@contextmanager
def registered_only_here() -> Iterator[None]:
    """Undo on leaving what was registered inside, and forget the example plugins, which register when they are imported."""
    registries = (plugins.TASKS, plugins.ESTIMATORS, plugins.RECALIBRATIONS, plugins.BACKENDS, plugins.METRICS)
    kept = [registry._objects for registry in registries] + [plugins._COLUMNS, plugins._TARGETS]
    before = [dict(mapping) for mapping in kept]
    try:
        yield
    finally:
        for mapping, old in zip(kept, before, strict=True):
            mapping.clear()
            mapping.update(old)
        for name in [name for name in sys.modules if name.startswith("tests.support.plugins")]:
            del sys.modules[name]
