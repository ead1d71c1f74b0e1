"""The licence that a student inherits: read from its base model's card, never guessed."""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache

from ..hub.session import is_offline
from .render import hub_id


class License(NamedTuple):
    """A licence as the Hub writes it; `name` and `link` go with `id="other"`."""

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def shown(self) -> str:
        text = self.name or self.id
        return f"[{text}]({self.link})" if self.link else text

    @property
    def metadata(self) -> dict[str, str]:
        fields = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {name: value for name, value in fields.items() if value is not None}


def find_license(name_or_path: str | None, token: str | None = None) -> License | None:
    """
    Licence stated in a model's card: in a local folder, in the client's cache, or on the Hub when it can be reached.

    Args:
        name_or_path (`str`, *optional*): Folder or Hub id.
        token (`str`, *optional*): Hub token, for private repositories.

    Returns:
        [`License`] or `None`: `None` when no card states one or none can be read now.
    """
    if not name_or_path:
        return None
    if Path(name_or_path).is_dir():
        return _of_file(Path(name_or_path) / "README.md")
    repo_id = hub_id(name_or_path)
    if repo_id is None:
        return None
    cached = try_to_load_from_cache(repo_id, "README.md")
    if isinstance(cached, str) and (found := _of_file(Path(cached), repo_id)) is not None:
        return found
    if is_offline():
        return None
    try:
        return _on_hub(repo_id, token)
    except Exception:
        # Absent, gated, no network: a card must come out of a machine without a connection too, and says so
        return None


# An exception is not kept: once the Hub answers again, so does this
@lru_cache(maxsize=64)
def _on_hub(repo_id: str, token: str | None) -> License | None:
    return _of_data(HfApi(token=token).model_info(repo_id, timeout=10).card_data, repo_id)


def _of_file(path: Path, repo_id: str | None = None) -> License | None:
    if not path.is_file():
        return None
    try:
        return _of_data(ModelCard.load(path, ignore_metadata_errors=True).data, repo_id)
    except (ValueError, OSError):
        return None


def _of_data(data: Any, repo_id: str | None) -> License | None:
    stated = None if data is None else data.get("license")
    if isinstance(stated, list):
        stated = stated[0] if len(stated) == 1 else None
    if not isinstance(stated, str) or not stated:
        return None
    name, link = data.get("license_name"), data.get("license_link")
    if isinstance(link, str) and "://" not in link:
        # A file of the repository that states it
        link = f"https://huggingface.co/{repo_id}/blob/main/{link}" if repo_id else None
    return License(stated, name if isinstance(name, str) else None, link if isinstance(link, str) else None)
