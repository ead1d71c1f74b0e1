"""Dataset card of a teacher cache."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from ..cache.folder import cache_size, finished_splits, load_manifest, shard_paths
from ..cache.manifest import Manifest
from ..cache.schema import TAIL_LOGPROB, TOPK_IDS, TOPK_LOGPROBS
from .render import public_name, render


# Rows that stand for all when the size as JSON lines is estimated
_JSON_ROWS = 200


def _shown(k: int) -> list[int]:
    """Numbers of kept tokens whose mass the card tells: the first five, and all."""
    return sorted({*range(1, min(k, 5) + 1), k})


def teacher_cache_card(
    folder: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    license: str | None = None,
    source_license: str | None = None,
    teacher_license: str | None = None,
    teacher_name: str | None = None,
    sources: Mapping[str, str] | None = None,
) -> str:
    """
    Dataset card of a teacher cache: provenance, how to load it and train from it, kept mass, calibration, size and
    licences, with the metadata that the Hub's viewer needs.

    Args:
        folder (`str` or `os.PathLike`):
            Cache folder with one or more finished splits.
        repo_id (`str`, *optional*):
            Repository the card is for; enters the example.
        license (`str`, *optional*), source_license (`str`, *optional*), teacher_license (`str`, *optional*):
            Licences of the cache, its source data and its teacher. They cannot be read off a cache, so the card says
            when one is not stated.
        teacher_name (`str`, *optional*):
            What to call the teacher; default is the name it was loaded by, which says little of a folder.
        sources (`dict[str, str]`, *optional*):
            Split -> what its rows are, Markdown allowed; default is what the dataset was called.

    Returns:
        `str`: The card with its YAML header.

    Raises:
        `ValueError`: The folder holds no finished cache.
    """
    names = finished_splits(folder) or ["train"]
    # The split that students are trained on comes first
    names.sort(key=lambda name: name != "train")
    manifests = {name: load_manifest(folder, name) for name in names}
    first = manifests[names[0]]
    fits = [_fit(method, fit) for manifest in manifests.values() for method, fit in manifest.recalibration.items()]
    fits = [fit for i, fit in enumerate(fits) if fit not in fits[:i]]  # one stored with two splits
    paper = next((fit for fit in fits if fit["method"] == "probability_temperature"), fits[0] if fits else None)
    metadata: dict[str, Any] = {
        "license": license,
        "tags": ["first_trl", "distillation", "teacher-logprobs", "trl", "calibration"],
        "task_categories": ["text-generation"],
        "configs": _configs(folder, names),
    }
    return render(
        "teacher_cache.md.j2",
        metadata=yaml.safe_dump({k: v for k, v in metadata.items() if v is not None}, sort_keys=False).strip(),
        repo_id=repo_id,
        teacher=first.teacher,
        members=first.teacher.get("members") or [],
        log_members=math.log(max(1, first.committee_size)),
        teacher_name=teacher_name or public_name(first.teacher["name"]),
        backend=first.backend,
        tokenizer=first.tokenizer,
        head_size=first.head_size,
        k=first.k,
        mass_columns=["1", *(f"1..{count}" for count in _shown(first.k)[1:])],
        logprob_dtype=first.logprob_dtype,
        num_draws=first.num_draws,
        draw_seed=first.draw_seed,
        notes=first.notes,
        source_license=source_license,
        teacher_license=teacher_license,
        suggested_method=paper["method"] if paper else "none",
        suggested_value=paper["value"] if paper else None,
        splits=[
            {**_split(folder, name, manifest), "source": (sources or {}).get(name) or manifest.source["name"]}
            for name, manifest in manifests.items()
        ],
        shows_gold=any(manifest.counts.get("rows_without_gold") for manifest in manifests.values()),
        fits=fits,
    )


def _configs(folder: str | os.PathLike[str], names: list[str]) -> list[dict[str, Any]]:
    """
    One config a set of columns, since the splits of one config must have the same: the first is the default, another is
    called after its first split.
    """
    by_columns: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        columns = tuple(pq.read_schema(shard_paths(folder, name)[0]).names)
        by_columns.setdefault(columns, []).append(name)
    return [
        {
            "config_name": group[0] if number else "default",
            "data_files": [{"split": name, "path": f"data/{name}-*.parquet"} for name in group],
        }
        for number, group in enumerate(by_columns.values())
    ]


def _split(folder: str | os.PathLike[str], name: str, manifest: Manifest) -> dict[str, Any]:
    size, positions = cache_size(folder, name), manifest.counts["positions"]
    return {
        "name": name,
        "id": manifest.id,
        "rows": manifest.counts["rows"],
        "without_gold": manifest.counts.get("rows_without_gold", 0),
        "positions": positions,
        "dropped": sum(value for key, value in manifest.counts.items() if key.startswith("dropped")),
        "truncated": manifest.counts.get("truncated", 0),
        "mass": [f"{manifest.kept_mass[count - 1]:.4f}" for count in _shown(manifest.k)],
        "teacher_bytes": size["teacher_bytes"] / positions,
        "bytes": size["bytes"] / positions,
        "json_bytes": _json_bytes(shard_paths(folder, name)[0]),
    }


def _json_bytes(shard: Path) -> float:
    """Bytes per position of the teacher's entries written as JSON, measured on the first rows."""
    with pq.ParquetFile(shard) as file:
        rows = next(file.iter_batches(_JSON_ROWS, columns=[TOPK_IDS, TOPK_LOGPROBS, TAIL_LOGPROB])).to_pylist()
    lines = [
        json.dumps(
            {
                TOPK_IDS: row[TOPK_IDS],
                TOPK_LOGPROBS: [[round(value, 6) for value in entry] for entry in row[TOPK_LOGPROBS]],
                TAIL_LOGPROB: [round(value, 6) for value in row[TAIL_LOGPROB]],
            }
        )
        for row in rows
    ]
    return sum(len(line) + 1 for line in lines) / max(1, sum(len(row[TAIL_LOGPROB]) for row in rows))


def _fit(method: str, fit: dict[str, Any]) -> dict[str, Any]:
    """A row of the table of fits; a value put there by hand may come without what is known of a fit of this package."""
    target = f"`{fit['estimator']}`, {fit['top_k']} entries" if "estimator" in fit and "top_k" in fit else "–"
    raw, chosen = fit.get("raw") or {}, fit.get("chosen") or fit
    errors = [f"{100 * point['ece']:.1f}" if point.get("ece") is not None else "–" for point in (raw, chosen)]
    value = fit["value"] if "value" in fit else (fit.get("recalibration") or {}).get("value")
    return {
        "method": method,
        "value": value,
        "objective": str(fit.get("objective") or "–").upper(),
        "target": target,
        "n": f"{fit['n']:,}" if fit.get("n") else "–",
        "ece": " → ".join(errors),
    }
