"""Text-to-image on the digits, from captions to prompts: how often the class that a prompt asks for is drawn.

    python -m benchmarks.studies.captions_digits --work DIR --out captions-digits.json

A CLIP text encoder of random weights reads one to three captions of each scan; a small DiT attends to their tokens; the
digits' classifier reads what it draws for thirty prompts. A quarter of an hour on two CPU cores, by the commands that a
user types, started again they go on. Needs transformers and scikit-learn.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness.environment import conditions
from speed_engine.atomic_files import write_json, write_text
from speed_engine.reports.scores.digits import score_digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FORMS = ("a handwritten {}", "the digit {}", "a photo of the number {} written by hand")
PROMPTS = [form.format(word) for form in FORMS for word in WORDS]
GUIDANCE = (1.0, 2.0, 4.0)
NUM, SAMPLER_STEPS = 300, 25
WIDTH, LAYERS, HEADS, LENGTH = 32, 2, 4, 77


def write_pictures(folder: Path) -> None:
    """The scans as PNG, and COCO's JSON of their captions: of scan i the first 1 + i % 3 forms."""
    from sklearn.datasets import load_digits

    ink, labels = load_digits(return_X_y=True)
    (folder / "pictures").mkdir(exist_ok=True)
    pixels = np.round(ink * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    images, annotations = [], []
    for i, picture in enumerate(pixels):
        name = f"{i:05d}.png"
        Image.fromarray(picture).save(folder / "pictures" / name)
        images.append({"id": i, "file_name": name})
        for form in FORMS[: 1 + i % len(FORMS)]:
            annotations.append({"image_id": i, "caption": form.format(WORDS[labels[i]])})
    write_json(folder / "captions.json", {"images": images, "annotations": annotations})


def write_clip(folder: Path) -> None:
    """A text encoder of two layers and its tokenizer, which knows the captions' words as one token each."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in sorted({word for prompt in PROMPTS for word in prompt.split()}):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = ["".join(parts[:2]), *parts[2:]]
            tokens.append(parts[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer: Any = CLIPTokenizer  # its stubs know files alone
    unique = list(dict.fromkeys(merges))
    tokenizer(vocab=vocabulary, merges=unique, model_max_length=LENGTH).save_pretrained(folder)
    begin, end = (vocabulary[f"<|{name}oftext|>"] for name in ("start", "end"))
    torch.manual_seed(0)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=LENGTH,
            bos_token_id=begin,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    with torch.no_grad():  # as large as trained ones: those of the library's start say nothing
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.0 if "embedding" in name else weight.shape[1] ** -0.5)
    model.save_pretrained(folder)


def command(*words: object) -> None:
    """One of `python -m speed_engine`'s. Raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "speed_engine", *map(str, words)], check=True)


def judged(folder: Path) -> dict[str, Any]:
    """Share of the samples whose class is the prompt's, of all and by class."""
    with np.load(folder / "samples.npz") as arrays:
        pixels = arrays["arr_0"]
    asked = np.arange(len(pixels)) % len(PROMPTS) % len(WORDS)
    report = score_digits(pixels, asked)
    return {"num": len(pixels), **report["class_agreement"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the data and the run")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    asked = parser.parse_args()
    work: Path = asked.work
    work.mkdir(parents=True, exist_ok=True)
    write_pictures(work)
    if not (work / "clip").exists():
        write_clip(work / "clip")
    clip = ("--text-encoder", work / "clip")
    command(
        *("encode", "--images", work / "pictures", "--size", 8, "--channels", 1, "--min-side", 1),
        *("--captions", work / "captions.json", *clip, "--out", work / "set"),
    )
    settings = [
        "model={kind: dit_text, size: tiny/2, cross_attention: true}",
        f"data={{kind: shards, path: {work / 'set'}}}",
        "engine=torch",
        "train.flip=false",
        f"train.steps={asked.steps}",
        f"run_dir={work / 'run'}",
    ]
    command("train", "--config", "digits_dit_tiny", *settings)
    write_text(work / "prompts.txt", "\n".join(PROMPTS) + "\n")
    found: dict[str, Any] = {}
    for guidance in GUIDANCE:
        out = work / f"samples-{guidance:g}"
        command(
            *("sample", "--run", work / "run", "--num", NUM, "--sampler", "ddim", "--out", out),
            *("--steps", SAMPLER_STEPS, "--guidance", guidance, *clip),
            *("--prompts", work / "prompts.txt"),
        )
        found[f"{guidance:g}"] = judged(out)
        print(f"guidance {guidance:g}: {found[f'{guidance:g}']['agreement']:.3f}", flush=True)
    told = {"steps": asked.steps, "sampler": f"ddim, {SAMPLER_STEPS} steps", "prompts": PROMPTS}
    write_json(
        asked.out,
        {"conditions": conditions(torch.device("cpu")), **told, "by_guidance": found},
    )


if __name__ == "__main__":
    main()
