"""Sharing on the Hugging Face Hub: folders go up in one commit and come down pinned to one.

A push may be interrupted, repeated and raced by other writers: it is committed once, the repository
then equals the folder, and what was already sent is not sent again.
"""

from ..utils.retry import RetryPolicy
from .folder import PulledFolder, pull_folder, push_folder
from .session import DEFAULT_RETRY_POLICY


__all__ = [
    "DEFAULT_RETRY_POLICY",
    "PulledFolder",
    "RetryPolicy",
    "pull_folder",
    "push_folder",
]
