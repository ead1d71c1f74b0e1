"""Commits of the Hub."""

from typing import Any

from transformers.utils.hub import resolve_revision


def hub_commit(name: str, revision: str | None = None, **options: Any) -> str | None:
    """
    Commit that a repository's branch or tag stands for now.

    Args:
        name (`str`): Id of a repository, or a folder.
        revision (`str`, *optional*): Branch, tag or commit; by default the main branch.
        options: Arguments of `from_pretrained`; `cache_dir`, `local_files_only` and `token` are read; and
            `repo_type`, where it is no model.

    Returns:
        `str`: the commit; `None` for a folder, and where neither the Hub nor its cache tells.
    """
    where = {key: options[key] for key in ("cache_dir", "local_files_only", "token", "repo_type") if key in options}
    return getattr(resolve_revision(name, revision, **where), "resolved", None)
