"""Sharing on the Hugging Face Hub: datasets and folders go up in one commit, folders come down pinned to one.

A push may be interrupted, repeated and raced by other writers: it is committed once, it replaces what it names and
nothing else, and what was already sent is not sent again.
"""

from .dataset import push_dataset
from .folder import PulledFolder, pull_folder, push_folder, resolve_revision
from .session import DEFAULT_RETRY_POLICY, RetryPolicy


__all__ = [
    "DEFAULT_RETRY_POLICY",
    "PulledFolder",
    "RetryPolicy",
    "pull_folder",
    "push_dataset",
    "push_folder",
    "resolve_revision",
]
