"""A teacher backend: transformers, with a note in the manifest."""

from first_trl import register_backend
from first_trl.teacher.backends import TransformersBackend


@register_backend("noted")
def noted(model, note="scored by a plugin"):
    backend = TransformersBackend(model)
    backend.notes = [note]
    return backend
