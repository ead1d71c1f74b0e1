"""Hints for misspelt names."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, list_known: bool = True) -> str:
    """Hint for an unknown name."""
    by_lower = {item.lower(): item for item in sorted(known)}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    hint = f" Did you mean {by_lower[close[0]]!r}?" if close else ""
    return hint + (f" Known: {', '.join(by_lower.values())}." if list_known else "")
