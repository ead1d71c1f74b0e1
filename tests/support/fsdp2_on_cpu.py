"""
`first_trl` on CPU processes that accelerate shards with FSDP2.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m tests.support.fsdp2_on_cpu run quickstart --smoke

accelerate 1.15 turns to FSDP on accelerators only: on CPU processes it reads the same configuration and goes on as DDP,
without a word. This says FSDP in its place, and all that follows is accelerate's own.
"""

import sys
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType


def shard_on_cpu() -> None:
    """Makes accelerate's state say FSDP where it was asked for on CPU processes."""
    start = state.AcceleratorState.__init__

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or getattr(self, "fsdp_plugin", None)
        if self.distributed_type == DistributedType.MULTI_CPU and plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    state.AcceleratorState.__init__ = begin


if __name__ == "__main__":
    shard_on_cpu()
    from first_trl.cli import main

    sys.exit(main())
