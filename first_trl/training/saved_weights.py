"""Weights of one form in a folder and in a repository, so that what is loaded is what was trained last."""

import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import CommitOperationDelete, HfApi


_ADAPTER = re.compile(r"adapter_(config\.json|model\b.*)")
_FULL = re.compile(r"(model|pytorch_model)\b.*\.(safetensors|bin)(\.index\.json)?")


class SavedWeightsMixin:
    """
    Deletes weights of an earlier training in another form, such as an adapter below full weights: transformers and PEFT
    would take them in place of the new ones. For a subclass of [`~trl.SFTTrainer`].
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        trainer: Any = self
        if trainer.args.should_save and not is_peft_model(trainer.accelerator.unwrap_model(trainer.model)):
            for earlier in Path(output_dir or trainer.args.output_dir).glob("adapter_*"):
                if _ADAPTER.fullmatch(earlier.name):
                    earlier.unlink()
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def push_to_hub(self, *args: Any, token: str | None = None, revision: str | None = None, **kwargs: Any) -> Any:
        """
        As `Trainer.push_to_hub`; weights of an earlier push in another form, such as an adapter below full weights, are
        deleted, since they would be loaded in place of the new ones. That waits for the upload, also with `blocking=False`.
        """
        trainer: Any = self
        pushed = super().push_to_hub(*args, token=token, revision=revision, **kwargs)  # type: ignore[misc]
        if not trainer.is_world_process_zero():
            return pushed
        if isinstance(pushed, Future):
            pushed.result()
        api = HfApi(token=token or trainer.args.hub_token)
        where = {"repo_id": trainer.hub_model_id, "revision": revision or trainer.args.hub_revision}
        here = {path.name for path in Path(trainer.args.output_dir).iterdir()}
        earlier = [
            name
            for name in api.list_repo_files(**where)
            if (_ADAPTER.fullmatch(name) or _FULL.fullmatch(name)) and name not in here
        ]
        if earlier:
            api.create_commit(
                operations=[CommitOperationDelete(name) for name in earlier],
                commit_message="Delete the weights of an earlier push",
                **where,
            )
        return pushed
