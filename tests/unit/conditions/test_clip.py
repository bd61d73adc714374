"""A small CLIP with random weights and a tokenizer of letters, made and saved by transformers, through our loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from speed_engine.conditions import clip

transformers: Any = pytest.importorskip("transformers", reason="it is an extra")
pytestmark = pytest.mark.slow  # importing it takes seconds

TEXTS = ["a three", "three " * 60, ""]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    tokenizer.save_pretrained(folder)
    start, end = len(vocab) - 2, len(vocab) - 1
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    marks = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    config = transformers.CLIPConfig(
        text_config={**small, **marks, "vocab_size": len(vocab)},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_prompts_are_cut_and_filled_up_as_the_tokenizer_does(place: Path) -> None:
    """The text half of a whole CLIP's folder."""
    encoder = clip.TextEncoder(str(place))
    assert (encoder.width, encoder.length, encoder.identity) == (16, 77, place.name)
    found = encoder.encode(TEXTS)
    settings = {"padding": "max_length", "max_length": 77, "truncation": True}
    theirs = encoder.tokenizer(TEXTS, return_tensors="pt", **settings)
    expected = encoder.model(input_ids=theirs.input_ids)
    np.testing.assert_array_equal(found.tokens, expected.last_hidden_state.half().numpy())
    np.testing.assert_array_equal(found.pooled, expected.pooler_output.half().numpy())
    assert found.cut == [TEXTS[1]]


@torch.no_grad()
def test_likeness_is_the_cosine_of_the_whole_clip(place: Path) -> None:
    judge = clip.Likeness(str(place))
    pixels = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)
    found = judge.cosines(pixels, TEXTS[:2])
    x = (torch.from_numpy(pixels) / 255 - torch.tensor(clip.MEAN)) / torch.tensor(clip.STD)
    settings = {"padding": "max_length", "max_length": 77, "truncation": True}
    told = judge.tokenizer(TEXTS[:2], return_tensors="pt", **settings)
    # logits are the cosines times a learned scale
    logits = judge.model(
        input_ids=told.input_ids, pixel_values=x.permute(0, 3, 1, 2)
    ).logits_per_image
    torch.testing.assert_close(
        torch.from_numpy(found),
        logits.diagonal() / judge.model.logit_scale.exp(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_no_clip_at_all_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded") as told:
        clip.TextEncoder(str(tmp_path))
    assert "\n" not in str(told.value)
