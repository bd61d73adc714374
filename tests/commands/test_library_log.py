"""What libraries say is in a file of the run folder; the terminal has our own lines, and where the file is."""

import logging
import re
import sys
import warnings

import pytest

from speed_engine.training.library_log import libraries_apart

NOISY = """
import logging, sys, warnings
from speed_engine.timesteps import Method, uniform
from speed_engine.timesteps.uniform import Config as Uniform

class Config(Uniform):
    kind: str = "noisy.{name}"

def build(config, schedule):
    library = logging.getLogger("diffusers")
    library.handlers, library.propagate = [logging.StreamHandler()], False  # as it does when imported
    logging.getLogger("diffusers.models.vae").warning("a library's warning")
    try:
        1 / 0
    except ZeroDivisionError:
        logging.getLogger("diffusers.models.vae").exception("a library's failure")
    warnings.warn("a library's deprecation")
    logging.getLogger("my_lab").warning("the person's own line")
    {ending}
    return uniform.build(config, schedule)
"""
SAID = (
    "a library's warning",
    "a library's failure",
    "ZeroDivisionError",
    "a library's deprecation",
)


@pytest.fixture
def noisy(overrides, tmp_path, monkeypatch):
    """noisy(how its method ends) -> the words that train with it."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    library = logging.getLogger("diffusers")
    monkeypatch.setattr(library, "handlers", list(library.handlers))
    monkeypatch.setattr(library, "propagate", library.propagate)
    (tmp_path / "noisy").mkdir()

    def words(name: str, ending: str = "") -> list[str]:
        text = NOISY.format(name=name, ending=ending)
        (tmp_path / "noisy" / f"{name}.py").write_text(text)
        mine = ("timesteps.", "train.steps=")
        settings = [each for each in overrides(tmp_path / name) if not each.startswith(mine)]
        return ["train", "--config", "digits_dit_tiny", *settings, f"timesteps=noisy.{name}"]

    return words


def test_training_keeps_the_terminal_for_itself(good, noisy, tmp_path, caplog):
    words = noisy("quiet")
    first = good(*words, "train.steps=2")
    log = tmp_path / "quiet" / "libraries.log"
    assert first.err.count(f"what libraries say is in {log}") == 1
    assert all(said not in first.err + first.out for said in SAID)
    assert "the person's own line" in caplog.text and SAID[0] not in caplog.text
    written = log.read_text()
    assert all(said in written for said in SAID) and "the person's own line" not in written
    assert re.search(r"^20\d\d-\S+ \S+ WARNING diffusers.models.vae ", written, re.MULTILINE)
    good(*words, "train.steps=3")
    assert log.read_text().startswith(written) and len(log.read_text()) > len(written)


def test_what_has_no_folder_yet_is_shown_with_the_traceback(command, noisy, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="a defect"):
        command(*noisy("broken", "raise RuntimeError('a defect')"))
    assert not (tmp_path / "broken").exists()
    with pytest.raises(RuntimeError), libraries_apart(0):
        warnings.warn("a library's deprecation", stacklevel=1)
        raise RuntimeError
    assert "a library's deprecation" in capsys.readouterr().err


def test_a_mistake_is_one_sentence_all_the_same(command, noisy):
    answer = command(*noisy("mistaken", "raise ValueError('density must be positive')"))
    assert answer.code == 2 and "error: density must be positive" in answer.err
    assert all(said not in answer.err for said in SAID)


def test_a_traceback_is_in_the_file(tmp_path, capsys):
    with pytest.raises(RuntimeError), libraries_apart(1) as log:
        log.into(tmp_path)
        raise RuntimeError("a defect")
    assert "RuntimeError: a defect" in (tmp_path / "libraries.1.log").read_text()
    assert capsys.readouterr().out == ""  # of many processes the first tells where


def test_a_folder_that_is_gone_ends_nothing(tmp_path, capsys):
    with libraries_apart(0) as log:
        log.into(tmp_path / "gone")
        logging.getLogger("torch.distributed").warning("a library's warning")
    assert "a library's warning" in capsys.readouterr().err


def test_everything_is_as_before(capsys):
    before = logging.Logger.callHandlers, warnings.showwarning
    with libraries_apart(0):
        assert (logging.Logger.callHandlers, warnings.showwarning) != before
    assert (logging.Logger.callHandlers, warnings.showwarning) == before
