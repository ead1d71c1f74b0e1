"""A recalibration: some of the uniform distribution mixed in."""

import numpy as np

from first_trl import register_recalibration
from first_trl.recalibration import Method


@register_recalibration("uniform_mix")
class UniformMix(Method):
    symbol = "u"
    domain = "0 <= u < 1"
    grid = (0.0, 0.5, 0.1, 0.05)
    identity = 0.0

    def allows(self, value):
        return 0.0 <= value < 1.0

    def rescale(self, logprobs, value):
        q = np.exp(logprobs - np.logaddexp.reduce(logprobs, axis=-1, keepdims=True))
        return np.log((1 - value) * q + value / q.shape[1])
