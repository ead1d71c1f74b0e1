"""What a file is, by its name."""

from pathlib import PurePath


_KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".xlsx": "xlsx",
}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
ENDINGS = f"{', '.join(_KINDS)}, each also with {', '.join(_COMPRESSIONS)}"


def file_kind(path: str | PurePath) -> tuple[str, str | None, str | None]:
    """
    Stem, kind and compression of a file, in upper or lower case.

    Returns:
        `tuple`: the name without its endings; `"csv"`, `"tsv"`, `"jsonl"`, `"json"`, `"parquet"`, `"arrow"`, `"xlsx"`,
        `"zip"` (an archive that does not say what it holds) or `None`; and `".gz"`, `".bz2"`, `".xz"`, `".zst"`, `".zip"`
        or `None`.
    """
    name = PurePath(path).name
    compression = next((ending for ending in _COMPRESSIONS if name.lower().endswith(ending)), None)
    if compression is not None:
        name = name[: -len(compression)]
    ending = next((ending for ending in _KINDS if name.lower().endswith(ending)), None)
    if ending is not None:
        return name[: -len(ending)], _KINDS[ending], compression
    return name, "zip" if compression == ".zip" else None, compression
