"""The quickstart recipe at a size that runs in seconds."""

# Overrides, as `first-trl run` takes them
TINY = [
    "task.splits.pretrain={split: pretrain, limit: 64}",
    "task.splits.train={split: train, limit: 96}",
    "task.splits.validation={split: validation, limit: 64}",
    "task.splits.test={split: test, limit: 60}",
    "task.splits.ood={split: ood, limit: 50}",
    "teacher.pretrain.num_train_epochs=1",
    "teacher.sft.num_train_epochs=1",
    "student.pretrain.num_train_epochs=1",
    "training.num_train_epochs=1",
    "training.global_batch_size=32",
]
