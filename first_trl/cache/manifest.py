"""The manifest of a teacher cache: what it is, where it came from, and the id that its rows carry."""

import hashlib
import json
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset


FORMAT_VERSION = 1


def tokenizer_fingerprint(processing_class: Any) -> str:
    """
    Digest of what maps text to ids: the whole vocabulary (added tokens included), merges, normaliser and
    pre-tokenizer. Padding, truncation and the choice of pad / bos / eos token do not enter, because trainers set
    them without changing the meaning of any id.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    parts: dict[str, Any] = {"vocab": sorted(tokenizer.get_vocab().items())}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        spec = json.loads(backend.to_str())
        parts["merges"] = (spec.get("model") or {}).get("merges")
        parts["normalizer"] = spec.get("normalizer")
        parts["pre_tokenizer"] = spec.get("pre_tokenizer")
    return _hexdigest(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode())


def chat_template_hash(processing_class: Any) -> str | None:
    """Digest of the chat template, `None` when the tokenizer has none."""
    template = getattr(processing_class, "chat_template", None)
    return None if template is None else _hexdigest(json.dumps(template, sort_keys=True).encode())


def _hexdigest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


@dataclass
class Manifest:
    """
    What a cache is and where it came from. `identity` fields are fixed when the capture starts and define the cache's
    id, so that a resumed capture cannot mix teachers, data or settings; the rest is filled in when it ends.

    Args:
        teacher (`dict`): `{"name", "revision", "weights_digest", "parameters"}`; of a committee also `members`, a list of
            such entries, and the digest is of theirs.
        backend (`dict`): `{"name", "version", "dtype", "quantization"}`.
        tokenizer (`dict`): `{"name", "fingerprint", "chat_template", "size", "front", "from_template",
            "template_arguments"}`: hash of the chat template, special tokens in front of a text, whether the template
            wrote the rows (`None` for rows that came as ids), and the arguments it was given.
        head_size (`int`): Rows of the teacher's output head; may exceed the tokenizer's size (padded heads).
        k (`int`): Entries kept per supervised position.
        logprob_dtype (`str`): `"float16"` or `"float32"`.
        num_draws (`int`): Draws stored per position for the `sampled` estimator; 0 for none.
        draw_seed (`int`): Seed of the draws.
        source (`dict`): `{"name", "fingerprint", "rows"}` of the tokenised input.
        split (`str`): Name of the split.
        counts (`dict`): Rows, supervised positions, how many of either have no answer, rows dropped with the reason.
        kept_mass (`list[float]`): Mean teacher mass of the 1..k most likely tokens.
        recalibration (`dict`): Fitted recalibrations by method, curve included.
        versions (`dict`): Library versions.
        timing (`dict`): Wall time in seconds and tokens per second.
        notes (`list[str]`): Anything a reader must know, e.g. a tail derived from rounded values.
    """

    teacher: dict[str, Any]
    backend: dict[str, Any]
    tokenizer: dict[str, Any]
    head_size: int
    k: int
    logprob_dtype: str
    source: dict[str, Any]
    num_draws: int = 0
    draw_seed: int = 0
    split: str = "train"
    format_version: int = FORMAT_VERSION
    counts: dict[str, Any] = field(default_factory=dict)
    kept_mass: list[float] = field(default_factory=list)
    recalibration: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def committee_size(self) -> int:
        """Teachers whose mean distribution this is; 0 where there is one teacher and no committee."""
        return len(self.teacher.get("members") or ())

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that define the cache. Two captures with equal identity hold the same rows."""
        # Not `asdict`, which copies the curves of the fits too: every look at a cache asks for its id
        identity = {
            key: deepcopy(getattr(self, key))
            for key in (
                "format_version", "head_size", "k", "logprob_dtype", "num_draws", "draw_seed", "backend", "split",
            )
        }  # fmt: skip
        # Names, commits and paths are provenance, not identity: the same weights in another folder are the same teacher
        identity["teacher"] = {"weights_digest": self.teacher.get("weights_digest")}
        identity["tokenizer"] = {key: self.tokenizer.get(key) for key in ("fingerprint", "chat_template")}
        identity["source"] = {key: self.source.get(key) for key in ("fingerprint", "rows")}
        return identity

    @property
    def id(self) -> str:
        return _hexdigest(json.dumps(self.identity, sort_keys=True, default=str).encode())

    @property
    def cache_id(self) -> str:
        """Value of the `teacher_cache` column: manifest id and tokenizer fingerprint."""
        return f"{self.id}:{self.tokenizer['fingerprint']}"

    def to_json(self) -> str:
        data = asdict(self)
        return json.dumps({"id": self.id, "digest": _digest(data), **data}, indent=2, sort_keys=True, default=str)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises `ValueError` when the text is no manifest of this format or was edited after it was written."""
        try:
            data = json.loads(text)
            if not isinstance(data, dict):
                raise ValueError(f"expected an object, got {type(data).__name__}")
            stated, digest = data.pop("id", None), data.pop("digest", None)
            if data.get("format_version") != FORMAT_VERSION:
                raise ValueError(
                    f"format version {data.get('format_version')} where this package reads {FORMAT_VERSION}; install "
                    "the version of first_trl that wrote it"
                )
            manifest = cls(**data)
            actual = manifest.id
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"Not a teacher-cache manifest: {error}. Pull or capture the cache again.") from error
        if stated != actual:
            raise ValueError(
                f"The manifest states id {stated} but its contents give {actual}: teacher, tokenizer, k or source "
                "were edited after the capture. Restore the original manifest."
            )
        if digest != _digest(data):
            raise ValueError(
                "The manifest was edited after it was written: its digest does not match. Restore the original "
                "manifest; a fitted recalibration is added with `first_trl.cache.folder.store_recalibration`."
            )
        return manifest


def _digest(data: dict[str, Any]) -> str:
    return _hexdigest(json.dumps(data, sort_keys=True, default=str).encode())


def split_cache_id(cache_id: str) -> tuple[str, str]:
    """`teacher_cache` value -> (manifest id, tokenizer fingerprint)."""
    manifest_id, separator, fingerprint = cache_id.partition(":")
    if not separator or not manifest_id or not fingerprint:
        raise ValueError(f"`teacher_cache` must read '<manifest id>:<tokenizer fingerprint>', got {cache_id!r}.")
    return manifest_id, fingerprint


def attach_manifest(dataset: Dataset, manifest: Manifest) -> Dataset:
    """
    Carry the manifest with an in-memory dataset. `DatasetInfo.description` is the one free-text field that `map`,
    `select`, `shuffle`, `train_test_split` and `save_to_disk` keep.
    """
    dataset = dataset.select_columns(dataset.column_names)  # a copy, so that the caller's object stays as it was
    dataset.info.description = json.dumps({"first_trl_manifest": json.loads(manifest.to_json())})
    return dataset


def read_manifest(dataset: Any) -> Manifest | None:
    """Manifest attached to a dataset, `None` when it carries none (or several, after concatenation)."""
    manifests = read_manifests(dataset)
    return manifests[0] if len(manifests) == 1 else None


def read_manifests(dataset: Any) -> list[Manifest]:
    """Manifests attached to a dataset: one, several after `concatenate_datasets`, or none."""
    description = getattr(getattr(dataset, "info", None), "description", "") or ""
    manifests = []
    # `DatasetInfo.from_merge` puts the descriptions below one another, and a manifest is attached as a single line
    for part in description.split("\n\n"):
        try:
            data = json.loads(part)["first_trl_manifest"]
        except (json.JSONDecodeError, KeyError, TypeError):
            return []
        manifests.append(Manifest.from_json(json.dumps(data)))
    return manifests
