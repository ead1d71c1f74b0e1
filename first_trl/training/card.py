"""The model card of a trainer's student: what the trainer knows, and the evaluations that it is given."""

import json
import os
import re
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from transformers import is_wandb_available

from .._trl_compat import (
    get_comet_experiment_url,
    get_config_model_id,
    get_dataset_column_names,
    get_trackio_space_url,
)
from ..cache.manifest import Manifest, read_manifests
from ..cards.license import find_license
from ..cards.render import hub_id, public_name
from ..cards.scores import score_result
from ..cards.student import Evaluation, StudentCard
from ..cards.wording import PROCESSES, cache_text, estimator_text, recalibration_text, shared_cache_text
from ..evaluation.predictions import MultipleChoiceResult
from ..utils.versions import training_versions
from ..vocabulary import TARGET_PROBS, TARGET_VOTES
from .options import CARD_OPTIONS


_STUDENT = "This student"


class ModelCardMixin:
    """Writes this package's card where TRL's trainers write theirs: at every saved checkpoint and push."""

    def _start_card(self, train_dataset: Any) -> None:
        """Keep what the card says of the cache, before the dataset is prepared for training."""
        self._manifests = read_manifests(train_dataset)
        self._trained_columns = get_dataset_column_names(train_dataset)
        self._cache_page = str(getattr(getattr(train_dataset, "info", None), "homepage", "") or "")
        self._evaluations: dict[tuple[str, str | None], Evaluation] = {}

    def add_evaluation(
        self, result: MultipleChoiceResult, *, dataset_name: str, split: str | None = None, name: str | None = None
    ) -> None:
        """
        Attach the evaluation of the trained model to its card: table, reliability diagram and the Hub's metadata. A
        second one of the same data and split takes the place of the first; training on removes all.

        Args:
            result ([`~first_trl.evaluation.predictions.MultipleChoiceResult`]):
                From [`evaluate_multiple_choice`].
            dataset_name (`str`):
                Name of the data: its Hub id where it has one.
            split (`str`, *optional*):
                Split that was evaluated.
            name (`str`, *optional*):
                Heading; default is the split, or the name of the data.

        Example:

        ```python
        result = evaluate_multiple_choice(trainer.model, tokenizer, dataset)
        trainer.add_evaluation(result, dataset_name="tau/commonsense_qa", split="validation")
        trainer.push_to_hub()
        ```
        """
        dataset_id = hub_id(dataset_name)
        shown = dataset_name if dataset_id else public_name(dataset_name)
        self._evaluations[dataset_name, split] = Evaluation(
            name=name or split or shown,
            models={_STUDENT: score_result(result)},
            student=_STUDENT,
            dataset_name=shown,
            dataset_id=dataset_id,
            split=split,
        )

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write the model card, with `reliability.png` where an evaluation was attached, to the output folder.

        Args:
            model_name (`str`, *optional*):
                Name of the model.
            dataset_name (`str`, *optional*):
                Teacher cache on the Hub; found by itself when the cache was loaded from there.
            tags (`str` or `list[str]`, *optional*):
                Tags beside the standing ones.
        """
        trainer: Any = self
        if not trainer.is_world_process_zero():
            return
        card = self._card(model_name, dataset_name, [tags] if isinstance(tags, str) else list(tags or []))
        card.write(Path(trainer.args.output_dir))

    def _card(self, model_name: str | None, dataset_name: str | None, tags: list[str]) -> StudentCard:
        trainer: Any = self
        args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
        adapter = is_peft_model(model)
        name_or_path = get_config_model_id(model.config) or ""
        base = hub_id(name_or_path)
        license = find_license(name_or_path, args.hub_token)
        rescale = trainer._recalibration
        given = args.recalibration_value is not None
        repo, commit = _cache_repo(self._cache_page, dataset_name)
        card = StudentCard(
            name=model_name or str(args.hub_model_id or args.output_dir).rstrip("/").rsplit("/", 1)[-1],
            repo_id=getattr(trainer, "hub_model_id", None) or args.hub_model_id,
            adapter=adapter,
            base_model=base,
            base_description=_base_text(name_or_path, base, model),
            cache=cache_text(self._manifests),
            cache_repo=repo,
            recalibration=recalibration_text(
                rescale.method,
                rescale.value,
                "set in the training arguments" if given else "fitted on validation rows and stored with the cache",
            ),
            estimator=estimator_text(args.estimator),
            facts=[
                *_target_facts(self._trained_columns, args.soft_label_weight),
                *_template_facts(self._manifests),
                *_adapter_facts(model, adapter),
                *_log_facts(),
            ],
            arguments={**vars(args), PROCESSES: args.world_size},
            own_arguments=CARD_OPTIONS,
            evaluations=list(self._evaluations.values()),
            license=license,
            license_source="as its base model"
            if license
            else "the card of the base model states no licence, or could not be read when this card was made",
            tags=[*sorted({*tags, *(["hf_jobs"] if "JOB_ID" in os.environ else [])}), "generated_from_trainer"],
            versions=training_versions(),
        )
        if self._manifests:
            teacher = self._manifests[0].teacher
            count = len({manifest.teacher["weights_digest"] for manifest in self._manifests})
            card.teacher = _teacher_text(teacher, count)
            card.teacher_license = find_license(teacher["name"], args.hub_token)
            card.cache_versions = self._manifests[0].versions
        if repo is not None:
            card.cache = shared_cache_text(repo, commit, card.cache)
        return card


def _cache_repo(page: str | None, dataset_name: str | None) -> tuple[str | None, str | None]:
    found = re.search(r"/datasets/([\w.-]+/[\w.-]+)/tree/([0-9a-f]{40})", page or "")
    if found is not None and dataset_name in (None, found[1]):
        return found[1], found[2]
    return hub_id(dataset_name), None


def _base_text(name_or_path: str, base: str | None, model: Any) -> str:
    if base is not None:
        return ""  # models no longer tell of which commit they are
    if name_or_path:
        return f"a local model, `{public_name(name_or_path)}`"
    return f"a `{model.config.model_type}` without a name"


def _teacher_text(teacher: dict[str, Any], count: int) -> str:
    name, revision = public_name(teacher["name"]), teacher.get("revision")
    text = f"[{name}](https://huggingface.co/{name})" if "/" in name else f"`{name}`"
    text += f" at commit `{revision}`" if revision else ""
    text += f", {teacher['parameters']:,} parameters" if teacher.get("parameters") else ""
    return f"{text}, and {count - 1} more, each for a part of the rows" if count > 1 else text


def _template_facts(manifests: list[Manifest]) -> list[tuple[str, str]]:
    """Arguments that the chat template was given at the capture: who asks the student gives the same."""
    found = [manifest.tokenizer.get("template_arguments") for manifest in manifests]
    texts = dict.fromkeys(f"`chat_template_kwargs={json.dumps(arguments)}`" for arguments in found if arguments)
    return [("Chat template", ", ".join(texts))] if texts else []


def _target_facts(columns: list[str], weight: float | None) -> list[tuple[str, str]]:
    """What stood in place of a cached teacher, or beside it."""
    name = next((name for name in (TARGET_PROBS, TARGET_VOTES) if name in columns), None)
    if name is None:
        return []
    share = (
        "in place of a teacher" if weight is None else f"{100 * weight:g} % of the target, the rest is the teacher's"
    )
    return [("Soft labels", f"`{name}` of the training rows, over the choices: {share}")]


def _adapter_facts(model: Any, adapter: bool) -> list[tuple[str, str]]:
    if not adapter:
        return []
    config = model.peft_config[model.active_adapter]
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
    values = {name: getattr(config, name, None) for name in names}
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    text = ", ".join(f"`{name}` {value}" for name, value in values.items() if value is not None)
    return [(str(getattr(config.peft_type, "value", config.peft_type)), text)]


def _log_facts() -> list[tuple[str, str]]:
    urls = {"trackio": get_trackio_space_url(), "comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        urls["Weights & Biases"] = wandb.run.url if wandb.run is not None else None
    found = ", ".join(f"[{name}]({url})" for name, url in urls.items() if url)
    return [("Training logs", found)] if found else []
