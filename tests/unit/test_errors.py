"""What a person can mend is a sentence and exit code 2; what only we can keeps its traceback."""

import numpy as np
import pytest
import torch

from speed_engine.errors import SaidElsewhere, told_in_one_sentence


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


def test_what_libraries_say_is_told_as_a_sentence(tmp_path, capsys):
    from safetensors import safe_open

    (tmp_path / "x.safetensors").write_bytes(b"\x08")

    def read() -> int:
        safe_open(tmp_path / "x.safetensors", framework="pt").__enter__()
        return 0

    assert told_in_one_sentence(read) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: a file of weights cannot be read") and text.count("\n") == 1


def test_what_another_process_says_is_not_said_again(capsys):
    def follow() -> int:
        raise SaidElsewhere("process 1 failed")

    assert told_in_one_sentence(follow) == 2
    assert capsys.readouterr().err == ""
