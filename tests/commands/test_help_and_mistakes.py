"""Every command's --help, and what a user can type wrong: exit code 2, one sentence, nothing written."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from speed_engine.__main__ import COMMANDS, module

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = "sample --run {run} --out {new} --steps 2"

# Command line -> words of the sentence. {run}: a good run; {samples}: its samples; {data}: its data;
# {file}: a file that is none of these; {new}: a path where nothing is.
MISTAKES = {
    "paper tab2_metfaces_sped": ["tab2_metfaces_sped", "tab2_metfaces_speed"],
    "encode": ["--images", "--verify"],
    "encode --images {new} --out {new}2": ["{new}", "--images"],
    "encode --images digits": ["--out"],
    "encode --images digits --out {new} --size 8": ["digits are 8 x 8"],
    "encode --images digits --out {file}": ["{file}", "--out"],
    "encode --images {data} --out {new} --mode latents": ["--vae"],
    "encode --reindex {run}": ["{run}", "*.tar"],
    "encode --images digits --out {new} --scale 2": ["--scale", "latents"],
    "encode --images digits --out {new} --shard-size 0": ["--shard-size", "at least 1"],
    "encode --verify {new}": ["{new}", "--verify"],
    "train": ["--config"],
    "train --config digits_dit_tiny data.path={file} run_dir={new}": ["{file}", "data.path"],
    "train --config digits_dit_tyni": ["did you mean 'digits_dit_tiny'"],
    "train --config digits_dit_tiny train.step=3": ["train.step", "did you mean 'steps'"],
    "train --config digits_dit_tiny train.steps=-3": ["train.steps", "-3"],
    "train --config digits_dit_tiny steps": ["steps"],
    "train --config digits_dit_tiny --steps 3": ["--steps"],
    "train --config digits_dit_tiny seed=1 seed=2": ["seed", "twice"],
    "train --config {file} run_dir={new}": ["{file}"],
    "keys timestep": ["did you mean 'timesteps'"],
    "keys timesteps speeed": ["did you mean 'speed'"],
    "keys train speed": ["train has no kinds"],
    "keys train --markdown": ["--markdown"],
    "compare": ["name a study", "digits_components"],
    "compare digit --out {new}": ["did you mean 'digits'"],
    "compare digits --out {new} --jobs 0": ["--jobs 0", "at least 1"],
    "compare digits --out {new} metric=fid": ["metrics.jsonl holds no 'fid'"],
    "compare digits --out {new} cadence=7": ["cadence=7", "choose a divisor"],
    "compare digits --out {new} baseline=sped": ["did you mean 'speed'"],
    "compare digits --out {run} metric=mse": ["{run}", "something else than a study"],
    "compare digits --report {run}": ["--report", "leave out the rest"],
    "compare --report {run}": ["{run}", "holds no report.json"],
    "plan": ["--config"],
    "plan --config {new}.yaml": ["{new}.yaml", "presets are"],
    "plan --config digits_dit_tiny model.kind=dot": ["model.kind", "'dot'", "dit"],
    "plan --config imagenet256_dit_xl2 model.patch_size=5": ["patch_size 5"],
    "plan --config digits_dit_tiny data=shards data.path={run}": ["{run}", "no data set"],
    "table --json --csv": ["--csv", "--json"],
    "table timesteps.kind=speeed": ["timesteps.kind", "did you mean 'speed'"],
    "table timesteps.kind=speed timesteps.k=0": ["timesteps.k", "given: 0"],
    "table schedule.num_steps=1": ["schedule.num_steps"],
    "table --compare speed,none": ["'none'", "there are"],
    "table --plot {file}": ["{file}"],
    "doctor --yaml": ["--yaml"],
    "doctor kernels.backend=cpp": ["kernels.backend=cpp"],
    "sample --run {run}": ["--out"],
    "sample --out {new}": ["--run", "--weights"],
    "sample --weights {new} --out {new}2": ["{new}", "no file or folder"],
    "sample --weights {file} --out {new}": ["{file}"],
    "sample --run {run} --weights {file} --out {new}": ["--weights", "ema or model"],
    f"{SAMPLE} schedule.kind=cosine": ["schedule.kind=cosine", "leave out"],
    "sample --weights {run}/checkpoints/step-00000020/ema.safetensors --out {new} train.steps=3": [
        "train",
        "schedule",
    ],
    "sample --run {new} --out {new}2": ["{new}", "--run"],
    "sample --run {data} --out {new}": ["{data}", "no checkpoint"],
    f"{SAMPLE} --sampler ddpmm": ["'ddpmm'", "ddpm"],
    f"{SAMPLE} --num 0": ["num", "0"],
    f"{SAMPLE} --steps 0": ["steps", "0"],
    f"{SAMPLE} --steps 1001": ["1001", "1000"],
    f"{SAMPLE} --label 10": ["label 10", "0 to 9"],
    f"{SAMPLE} --label -1": ["label -1", "0 to 9"],
    f"{SAMPLE} --guidance nan": ["guidance", "nan"],
    f"{SAMPLE} --guidance 2 --guidance-channels some": ["--guidance-channels", "'some'"],
    f"{SAMPLE} --guidance 2 --guidance-channels 2": ["2", "1"],
    f"{SAMPLE} --batch-size 0": ["--batch-size", "'0'"],
    f"{SAMPLE} --seed -1": ["seed", "-1"],
    f"{SAMPLE} --vae {{data}}": ["--vae", "pixels"],
    f"{SAMPLE} --shift 0": ["shift", "0"],
    f"{SAMPLE} --shift 3": ["shift", "3", "numbered steps"],
    "sample --run {run} --out {samples} --num 3": ["{samples}", "another recipe", "num=20"],
    "score --samples {samples}": ["--reference"],
    "score --samples {new} --reference digits": ["{new}", "`sample`"],
    "score --samples {run} --reference digits": ["{run}", "`sample`"],
    "score --samples {samples} --reference {new}": ["{new}", "digits"],
    "score --samples {samples} --reference {run}": ["{run}", "is a run", "{run}/samples"],
    "export --run {run} --out {new} --vae {file}": ["--vae", "--format diffusers"],
    "export --run {run} --out {new} --format diffusers --vae {file}": ["pixels", "leave out --vae"],
    "export --run {run} --out {data} --format diffusers": ["{data}", "choose another --out"],
    "export --run {run} --out {new} --format diffusers --scores {file}": ["{file}", "`score`"],
    "plot --run {new}": ["{new}", "--run"],
    "plot --run {run} --run {run} --out {new}": ["given twice"],
    "plot --run {data}": ["{data}", "no checkpoint"],
    "plot --run {run} --out {file}": ["{file}"],
    "summary --run {new}": ["{new}", "--run"],
    "summary --run {run} --started yesterday": ["--started", "yesterday"],
    "export --run {new} --out {new}2": ["{new}", "--run"],
    "export --run {run} --out {new} --format onnx": ["--format", "onnx"],
    "export --run {run} --out {file}/x": ["{file}"],
    "export --run {run} --out {file} --format diffusers": ["{file}"],
    "export --run {run} --out {run}": ["--out {run}", "folder"],
    "import --source {file} --out {run}": ["--out {run}", "folder"],
    "import --source {new} --out {new}2": ["{new}", "--source"],
    "import --source {file} --out {new}": ["{file}"],
    "import --source {data} --out {new}": ["{data}"],
    "import --source {run}/manifest.json --out {new}": ["manifest.json"],
}


def sentence_of(error: str) -> str:
    """The one sentence of a refusal; argparse puts its usage before it."""
    usage, _, sentence = error.rpartition("error: ")
    assert not usage or usage.startswith("usage:"), error
    assert sentence.endswith("\n") and sentence.count("\n") == sentence.count("\n    ") + 1, error
    return sentence.replace("\n    ", " ")  # which a terminal's width has broken


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence(command, run, samples, data, tmp_path, listing, line):
    for folder, name in ((run, "run"), (samples, "samples"), (data, "data")):
        assert folder.is_dir(), name
    (tmp_path / "file").write_text("neither weights nor a configuration")
    places = {"run": run, "samples": samples, "data": data}
    places |= {"file": tmp_path / "file", "new": tmp_path / "new"}
    before = [listing(folder) for folder in (run, samples, data, tmp_path)]
    answer = command(*line.format(**places).split(), watched=True)
    assert answer.code == 2, answer.err
    sentence = sentence_of(answer.err)
    for word in MISTAKES[line]:
        assert word.format(**places) in sentence, sentence
    assert "Traceback" not in answer.err + answer.out
    assert [listing(folder) for folder in (run, samples, data, tmp_path)] == before


def test_every_command_has_mistakes():
    assert {line.split()[0] for line in MISTAKES} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_argument(command, name):
    answer = command(name, "--help")
    assert answer.code == 0 and not answer.err
    words = " ".join(answer.out.split())
    assert COMMANDS[name] in words
    parser = argparse.ArgumentParser()
    module(name).add_arguments(parser)
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            assert all(option in words for option in action.option_strings)


def test_help_lists_the_commands(command):
    answer = command("--help")
    assert answer.code == 0
    listed = re.findall(r"^    (\w+) ", answer.out, re.MULTILINE)
    assert set(COMMANDS) <= set(listed)


def test_keys_are_told_for_one_kind_or_all(command):
    one, everything = command("keys", "timesteps", "speed"), command("keys")
    assert one.code == everything.code == 0
    assert "timesteps.k = number >= 1 (default 5)" in one.out and one.out.strip() in everything.out
    assert "optim.lr" not in one.out and "optim.lr = number >= 0 (default 0.0001)" in everything.out


def test_help_imports_nothing_heavy():
    """It answers in tenths of a second, which torch alone would take ten of."""
    code = (
        "import sys; from speed_engine.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print({'torch', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules))"
    )
    for words in (["--help"], ["sample", "--help"], ["table", "--help"], ["export", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "set()", words


def test_no_command_and_an_unknown_one(command):
    for words in ([], ["pain"]):
        answer = command(*words)
        assert answer.code == 2 and "COMMAND" in sentence_of(answer.err)


def test_in_a_process_of_its_own(tmp_path):
    """The exit code reaches the shell, and the reader of a pipe may leave early."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    line = [sys.executable, "-m", "speed_engine", "table"]
    settings = {"cwd": tmp_path, "env": environment, "text": True}
    wrong = subprocess.run([*line, "--compare", "x"], capture_output=True, **settings)
    assert wrong.returncode == 2 and "'x'" in sentence_of(wrong.stderr)
    bash = shutil.which("bash")
    assert bash is not None
    words = " ".join([*line, "--csv"])
    script = f"set -o pipefail; {words} | head -n 2"
    piped = subprocess.run([bash, "-c", script], capture_output=True, **settings)
    assert piped.returncode == 0 and "Traceback" not in piped.stderr
    assert len(piped.stdout.splitlines()) == 2


def test_train_py_refuses_as_the_command_does(tmp_path):
    words = ["--config", "digits_dit_tiny", "train.step=3"]
    script = str(ROOT / "speed_engine" / "train.py")
    done = subprocess.run(
        [sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "did you mean 'steps'" in sentence_of(done.stderr)
    assert not list(tmp_path.iterdir())
