"""Members are found by their file's name or by a dotted path, and what is saved finds them again."""

import sys
import textwrap

import pytest
import torch

from speed_engine import kinds
from speed_engine.config import ConfigError, build, load
from speed_engine.step_table import StepTable, build_step_table

METHOD = """
    from typing import Literal
    import torch
    from pydantic import BaseModel, Field
    from speed_engine.timesteps import Method, MethodConfig

    class Config({base}):
        {kind}
        power: float = Field(2.0, gt=0)

    def build(config, schedule):
        mass = torch.arange(1, schedule.num_rows + 1, dtype=torch.float64) ** config.power
        return Method(mass / mass.sum(), torch.ones_like(mass))
"""
KINDS = ['kind: Literal["ramp"] = "ramp"', 'kind: str = "anything"', '"""no kind at all"""']


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """write(name, text): a module of a package `my_lab` outside the repository."""
    (tmp_path / "my_lab").mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> str:
        (tmp_path / "my_lab" / f"{name}.py").write_text(textwrap.dedent(text))
        return f"my_lab.{name}"

    yield write
    for module in [m for m in sys.modules if m.split(".")[0] == "my_lab"]:
        del sys.modules[module]


def ramp(lab, kind: str = KINDS[0], base: str = "MethodConfig") -> str:
    return lab("mine", METHOD.format(kind=kind, base=base))


@pytest.mark.parametrize("section", kinds.SECTIONS)
def test_every_member_is_strict_and_frozen(section):
    for kind in kinds.names(section):
        config = kinds.config_class(section, kind)
        assert config.model_fields["kind"].default == kind
        assert issubclass(config, kinds.Section)


def test_the_folders_hold_what_they_should():
    assert {"linear", "cosine", "edm"} <= set(kinds.names("schedule"))
    assert {"deepspeed", "torch"} == set(kinds.names("engine"))
    assert "dit" in kinds.names("model")
    assert "parts" not in kinds.names("model")


def test_a_package_that_is_not_there_has_no_members(monkeypatch):
    monkeypatch.setitem(kinds.SECTIONS, "sampling", "speed_engine.no_such_package")
    assert kinds.names("sampling") == []
    with pytest.raises(ConfigError, match=r"sampling\.kind: there is no 'ddim'"):
        kinds.find("sampling", "ddim")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["MethodConfig", "BaseModel"])
def test_a_dotted_kind_survives_saving(lab, kind, base):
    """Whatever `kind` the module itself says, the configuration keeps the path that finds it."""
    path = ramp(lab, kind, base)
    config = load("digits_dit_tiny", [f"timesteps.kind={path}", "timesteps.power=3"])
    assert config.timesteps.kind == path
    saved = config.model_dump(mode="json")
    assert saved["timesteps"] == {
        "kind": path,
        "power": 3.0,
        "normalise": False,
        "weight_vb": False,
    }
    again = build(saved)
    assert again == config
    table = build_step_table(again.schedule, again.objective, again.timesteps)
    assert table.density[1] / table.density[0] == pytest.approx(8.0)
    with pytest.raises(ConfigError, match=r"unknown key timesteps\.powr; did you mean 'power'"):
        load("digits_dit_tiny", [f"timesteps.kind={path}", "timesteps.powr=3"])
    with pytest.raises(ValueError, match="frozen"):
        config.timesteps.power = 1.0


def test_a_table_of_ones_own_takes_a_dotted_kind(lab):
    path = ramp(lab)
    times = torch.arange(1, 101, dtype=torch.float64) / 100
    wanted = torch.arange(1, 101, dtype=torch.float64) ** 2
    for method in (path, {"kind": "combine", "parts": [path, "min_snr"]}):
        table = StepTable.from_flow(times, timesteps=method)
        torch.testing.assert_close(table.density, wanted / wanted.sum())
    assert table.timesteps.model_dump()["parts"][0]["kind"] == path


def test_an_outside_schedule(lab):
    path = lab(
        "noise",
        """
        from speed_engine.kinds import Section
        from speed_engine.schedules import linear

        class Config(Section):
            end: float = 0.05

        def build(config):
            return linear.build(linear.Config(beta_end=config.end))
        """,
    )
    config = load("digits_dit_tiny", [f"schedule={path}"])
    assert build(config.model_dump(mode="json")) == config
    table = build_step_table(config.schedule, config.objective, config.timesteps)
    assert table.schedule.betas is not None
    assert table.schedule.betas[-1].item() == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def build(config, schedule): ...", ["my_lab.part", "no class Config", "Section"]),
        (
            "class Config: ...\ndef build(config, schedule): ...",
            ["my_lab.part", "no class Config"],
        ),
        (
            "from speed_engine.kinds import Section\nclass Config(Section): ...",
            ["my_lab.part", "no function build", "speed_engine.timesteps"],
        ),
        ("import no_such_thing", ["cannot import 'my_lab.part'", "no_such_thing"]),
        ("def build(:", ["cannot import 'my_lab.part'", "invalid syntax"]),
    ],
)
def test_a_module_that_lacks_a_part_is_named(lab, text, words):
    path = lab("part", text)
    with pytest.raises(ConfigError) as caught:
        load("digits_dit_tiny", [f"timesteps.kind={path}"])
    for word in ["timesteps.kind", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_section_names_the_part_it_needs(lab):
    path = lab(
        "part",
        "from speed_engine.kinds import Section\nclass Config(Section): ...\ndef build(): ...",
    )
    with pytest.raises(ConfigError, match="has no function macs_per_sample"):
        kinds.find("model", path)
    with pytest.raises(ConfigError, match="has no function open_engine"):
        kinds.find("engine", path)


@pytest.mark.parametrize(
    "kind", [".", ".speed", "my_lab.", "a..b", "../speed", "os.path;x", "a b.c"]
)
def test_what_is_no_path_is_refused(kind):
    with pytest.raises(ConfigError, match=r"is no module's name"):
        kinds.find("timesteps", kind)


@pytest.mark.parametrize(
    "tree",
    [
        {"timesteps": "my_lab.evil"},
        {"timesteps": {"kind": "my_lab.evil"}},
        {"timesteps": {"kind": "combine", "parts": ["my_lab.evil"]}},
        {"timesteps": {"kind": "combine", "parts": [{"kind": "my_lab.evil"}]}},
        {"data": {"kind": "my_lab.evil", "unknown": 1}},
        {"engine": "my_lab.evil"},
    ],
)
def test_a_strangers_file_runs_no_code(lab, tmp_path, tree):
    """A tree that comes from a file may name outside modules only if they are trusted by name."""
    marker = tmp_path / "it_ran"
    lab("evil", f"open({str(marker)!r}, 'w')")
    tree = load("digits_dit_tiny").model_dump(mode="json") | tree
    for trusted in ((), ("my_lab.other", "my_lab")):
        with pytest.raises(ConfigError, match=r"add --trust my_lab\.evil"):
            build(tree, trusted)
    assert not marker.exists()
    with pytest.raises(ConfigError, match="no class Config"):
        build(tree, ("my_lab.evil",))
    assert marker.exists()
