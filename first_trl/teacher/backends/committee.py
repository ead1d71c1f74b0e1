"""A committee of teachers: the mean of their distributions, and how far they disagree."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from transformers import AutoTokenizer
from transformers.utils import cached_file, find_adapter_config_file

from ...cache.manifest import tokenizer_fingerprint
from .transformers import TransformersBackend, blocks


@dataclass(frozen=True)
class _Member:
    """One teacher: a model of its own, or an adapter of one that it shares."""

    name: str
    backend: TransformersBackend
    adapter: str | None

    def activate(self) -> TransformersBackend:
        if self.adapter is not None:
            self.backend.model.set_adapter(self.adapter)
        return self.backend


class CommitteeBackend(TransformersBackend):
    """
    Score rows with the mean distribution of `M` transformers models, `p = (p_1 + ... + p_M) / M` over the whole vocabulary:
    the kept entries are the most likely ones of the mean, and the tail is its own. Each position also gets the members'
    disagreement, the mutual information of the token and the member, `H(p) - (H(p_1) + ... + H(p_M)) / M` in nats: 0 where
    all say the same, at most log M (arXiv 1112.5745).

    All members are in memory together; LoRA adapters of one base share it. Beside a single teacher's memory a batch takes
    four bytes for each wanted position and token of the vocabulary, whatever M is.

    Args:
        members (`list`):
            Two or more teachers with one tokenizer: hub ids or folders, of models or of LoRA adapters; models; or pairs of a
            model and the name of one of its adapters, or of a model without adapters and what to call it.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Weights' dtype of members that are names.
        **model_init_kwargs:
            Passed to `from_pretrained` of members that are names. `revision` may be a list, one for each member.

    Raises:
        `ValueError`: Fewer than two members, members with other tokenizers, or the same weights twice.
    """

    def __init__(self, members: Sequence[Any], dtype: Any = "auto", **model_init_kwargs: Any) -> None:
        if isinstance(members, str) or len(members) < 2:
            raise ValueError(f"A committee has two or more teachers, got {members!r}. Give one teacher by itself.")
        revisions = model_init_kwargs.pop("revision", None)
        revisions = [revisions] * len(members) if revisions is None or isinstance(revisions, str) else list(revisions)
        if len(revisions) != len(members):
            raise ValueError(
                f"There are {len(revisions)} revisions for {len(members)} teachers: give one for each, or one for all."
            )
        named = [each for each in zip(members, revisions, strict=True) if isinstance(each[0], str)]
        if len(set(named)) < len(named):
            raise ValueError(
                f"A teacher is named twice among {[name for name, _ in named]}: it would count twice. Leave one out."
            )
        _check_tokenizers(members, revisions, bool(model_init_kwargs.get("trust_remote_code")))
        self.members: list[_Member] = []
        bases: dict[tuple[Any, ...], TransformersBackend] = {}
        for member, revision in zip(members, revisions, strict=True):
            own = {} if revision is None else {"revision": revision}
            self.members.append(_load(member, dtype, {**model_init_kwargs, **own}, bases))
        engines = [member.backend for member in self.members]
        bases_of_others = {id(e.model.get_base_model()) for e in engines if is_peft_model(e.model)}
        if any(id(engine.model) in bases_of_others for engine in engines):
            raise ValueError(
                "A teacher is the very model that another one's adapter was put on, so that the adapter acts in both. Load "
                "the model once more for the one without."
            )
        # Heads of one family are padded to different sizes: what a member does not have, it gives no probability
        self.head_size = max(engine.head_size or 0 for engine in engines)
        self.max_length = min((engine.max_length for engine in engines if engine.max_length), default=None)
        self.ranks_per_teacher = engines[0].ranks_per_teacher
        self.notes = [
            f"The distribution is the mean of the probabilities of {len(members)} teachers: "
            + ", ".join(_public(member.name) for member in self.members)
            + "."
        ]
        self._most_tokens = None

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        entries, engines = [], []
        with self._adapters_kept():
            for member in self.members:
                teacher, backend = member.activate().describe()
                entries.append({**teacher, "name": _public(member.name)})
                engines.append(backend)
        digests = [entry["weights_digest"] for entry in entries]
        twice = next((digest for digest in digests if digests.count(digest) > 1), None)
        if twice is not None:
            which = [entry["name"] for entry in entries if entry["weights_digest"] == twice]
            raise ValueError(
                f"Teachers {' and '.join(which)} are the same model: it would count twice. Leave one out."
            )
        identity = json.dumps(digests)
        models = {id(member.backend): member.backend.model for member in self.members}.values()
        names = ", ".join(entry["name"] for entry in entries)
        teacher = {
            "name": f"Committee of {len(entries)}: {names}",
            "revision": None,
            "weights_digest": hashlib.blake2b(identity.encode(), digest_size=8).hexdigest(),
            "parameters": sum(model.num_parameters() for model in models),
            "members": entries,
        }
        # One value where all have it
        kinds: dict[str, list[Any]] = {key: [] for key in engines[0]}
        for engine in engines:
            for key, value in engine.items():
                if value not in kinds[key]:
                    kinds[key].append(value)
        kinds["dtype"] = [", ".join(kinds["dtype"])]
        return teacher, {key: values[0] if len(values) == 1 else values for key, values in kinds.items()}

    @contextmanager
    def _adapters_kept(self) -> Iterator[None]:
        """A model that was given goes on with the adapters that were active, and trains what it trained."""
        models = {id(member.backend): member.backend.model for member in self.members if member.adapter is not None}
        active = [model.active_adapters for model in models.values()]
        before = [list(found() if callable(found) else found) for found in active]
        trained = [[p.requires_grad for p in model.parameters()] for model in models.values()]
        try:
            yield
        finally:
            for model, names, flags in zip(models.values(), before, trained, strict=True):
                if is_peft_model(model):
                    model.set_adapter(names[0])
                if len(names) > 1 or not is_peft_model(model):
                    # Several at once go through the tuner of a PEFT model
                    (model.base_model if is_peft_model(model) else model).set_adapter(names)
                for parameter, flag in zip(model.parameters(), flags, strict=True):
                    parameter.requires_grad = flag

    def _forward(
        self, rows: list[np.ndarray], row_index: np.ndarray, columns: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray | None]:
        with self._adapters_kept():
            return self._mean(rows, row_index, columns)

    def _mean(
        self, rows: list[np.ndarray], row_index: np.ndarray, columns: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray | None]:
        mean = entropy = torch.empty(0)
        for member in self.members:
            logits, at_rows, at_columns, _ = member.activate()._forward(rows, row_index, columns)
            if member is self.members[0]:
                shape = (len(columns), self.head_size or logits.shape[-1])
                mean = torch.full(shape, -torch.inf, device=logits.device)
                entropy = torch.zeros(len(columns), device=logits.device)
            for chosen, block in blocks(logits, at_rows, at_columns):
                block = block.log_softmax(-1).to(mean.device)
                own = torch.special.entr(block.exp()).sum(-1)
                if not own.isfinite().all():
                    row = rows[row_index[chosen][int((~own.isfinite()).nonzero()[0])]]
                    raise ValueError(
                        f"The logits of teacher {member.name} are NaN or infinite on the row of {len(row)} tokens that starts "
                        f"with {row[:8].tolist()}. Load it in bfloat16 or float32, and check its weights."
                    )
                entropy[chosen] += own
                total = mean[chosen, : block.shape[-1]]
                torch.logaddexp(total, block, out=total)
            del logits
        mean -= math.log(len(self.members))
        information = -entropy / len(self.members)
        every = np.arange(len(columns))
        for chosen, block in blocks(mean[None], np.zeros_like(every), every):
            information[chosen] += torch.special.entr(block.exp()).sum(-1)
        # Rounding leaves the range by 1e-7
        bounded = np.clip(information.cpu().numpy(), 0.0, np.float32(math.log(len(self.members))))
        return mean[None], np.zeros_like(every), every, bounded


def transformers_backend(teacher: Any, dtype: Any = "auto", **model_init_kwargs: Any) -> TransformersBackend:
    """
    The engine of a teacher, or of several as a committee; a list of one is that one.

    Args:
        teacher (`str`, [`~transformers.PreTrainedModel`] or a list of these), dtype, **model_init_kwargs:
            As in [`TransformersBackend`] and [`CommitteeBackend`].
    """
    if isinstance(teacher, list | tuple):
        if len(teacher) != 1:
            return CommitteeBackend(teacher, dtype, **model_init_kwargs)
        (teacher,) = teacher
        if isinstance(model_init_kwargs.get("revision"), list | tuple):
            (model_init_kwargs["revision"],) = model_init_kwargs["revision"]
    return TransformersBackend(teacher, dtype, **model_init_kwargs)


def _load(
    member: Any, dtype: Any, options: dict[str, Any], bases: dict[tuple[Any, ...], TransformersBackend]
) -> _Member:
    """A member's engine. `bases` holds the models that adapters were put on, by what they were loaded as."""
    if isinstance(member, tuple):
        model, name = member
        adapters = getattr(model, "peft_config", {})
        if adapters and name not in adapters:
            raise ValueError(f"The model has no adapter {name!r}, only {', '.join(adapters)}.")
        engine = bases.setdefault((id(model),), TransformersBackend(model))
        return _Member(name, engine, name if adapters else None)
    if not isinstance(member, str | os.PathLike):
        return _Member(member.config.name_or_path or type(member).__name__, TransformersBackend(member), None)
    name = os.fspath(member)
    where = {"revision": options["revision"]} if "revision" in options else {}
    config = find_adapter_config_file(name, **where)
    if config is None:
        return _Member(name, TransformersBackend(name, dtype, **options), None)
    settings = json.loads(Path(config).read_text(encoding="utf-8"))
    base = (settings["base_model_name_or_path"], settings.get("revision"))
    if base not in bases:
        bases[base] = TransformersBackend(name, dtype, **options)
        return _Member(name, bases[base], bases[base].model.active_adapters()[0])
    model = bases[base].model
    adapter = f"member_{len(model.peft_config)}"
    model.load_adapter(name, adapter_name=adapter, adapter_kwargs=where)
    return _Member(name, bases[base], adapter)


def _check_tokenizers(members: Sequence[Any], revisions: Sequence[str | None], trust_remote_code: bool) -> None:
    """Raises `ValueError` for members that bring different tokenizers; models and folders that bring none are passed over."""
    found: dict[str, str] = {}
    for member, revision in zip(members, revisions, strict=True):
        name = os.fspath(member) if isinstance(member, str | os.PathLike) else ""
        where = {"revision": revision}
        if not name or not cached_file(
            name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **where
        ):
            continue
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **where)
        found[name] = tokenizer_fingerprint(tokenizer)
    for name, fingerprint in found.items():
        first, other = next(iter(found.items()))
        if fingerprint != other:
            raise ValueError(
                f"Teachers {first} and {name} have different tokenizers ({other} and {fingerprint}): the same ids mean other "
                "tokens, and there is no mean over them. Give teachers of one family."
            )


def _public(name: str) -> str:
    # A local path is nobody else's business once the cache is shared
    return Path(name).name if os.path.isdir(name) else name
