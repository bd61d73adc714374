"""What a person can mend is a sentence and exit code 2; what only we can keeps its traceback."""

import numpy as np
import pytest
import torch

from speed_engine.errors import told_in_one_sentence


@pytest.mark.parametrize(
    "action",
    [
        lambda: torch.empty(10**15),
        lambda: np.empty(10**16),
        lambda: [0] * 10**17,
    ],
    ids=["torch", "numpy", "python"],
)
def test_not_enough_memory(action, capsys):
    assert told_in_one_sentence(action) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: not enough memory (") and text.count("\n") == 1


def test_our_own_mistakes_are_not_hidden():
    def wrong() -> int:
        raise RuntimeError("a shape that cannot be")

    with pytest.raises(RuntimeError, match="cannot be"):
        told_in_one_sentence(wrong)
