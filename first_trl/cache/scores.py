"""What an engine returns for one row, and a shard stores."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Scores:
    """
    Teacher entries of one row.

    Args:
        ids (`np.ndarray` of shape `(N, k)`, int32): Most likely first; equal values by rising id.
        logprobs (`np.ndarray` of shape `(N, k)`, float32): Full-vocabulary log-softmax at temperature 1.
        tail_logprob (`np.ndarray` of shape `(N,)`, float32): Log-mass outside the k ids; `-inf` when there is none.
        draws (`np.ndarray` of shape `(N, draws)`, int32, *optional*): Drawn ids.
        mutual_information (`np.ndarray` of shape `(N,)`, float32, *optional*): Of a committee: nats by which its members
            disagree.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tail_logprob: np.ndarray
    draws: np.ndarray | None = None
    mutual_information: np.ndarray | None = None
