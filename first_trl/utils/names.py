"""Hints for misspelt names."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, list_known: bool = True) -> str:
    """What the error about an unknown name ends with: the known name that is most like it, and all of them."""
    names = sorted(known)
    by_lower = {item.lower(): item for item in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    hint = f" Did you mean {by_lower[close[0]]!r}?" if close else ""
    if not list_known:
        return hint
    return f"{hint} Known: {', '.join(names)}." if names else " There are none."
