"""Confidences of answers: what counts as the right choice."""

import numpy as np
import pytest

from first_trl.evaluation.confidence import answers_to_confidences


@pytest.mark.parametrize("gold", [[True, 1], [1, False], [[0, True], [1]], np.array([True, False])])
def test_a_boolean_is_no_index_of_a_choice(gold):
    with pytest.raises(ValueError, match=r"gold of row \d is .*index of the right choice"):
        answers_to_confidences("x", [np.array([0.9, 0.1]), np.array([0.2, 0.8])], gold, definition="choice")


def test_indices_of_every_integer_type_are_read():
    scores = [np.array([0.9, 0.1]), np.array([0.2, 0.8])]
    for gold in ([0, 0], np.array([0, 0]), [[0], [0]], [np.int32(0), [0]]):
        assert answers_to_confidences("x", scores, gold, definition="choice").correct.tolist() == [True, False]
