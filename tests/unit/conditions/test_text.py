"""Captions: which one is drawn, what "none" is, what becomes of a prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from speed_engine.conditions import clip, text, undropped
from speed_engine.data import Facts
from speed_engine.data.space import Space

CAPTIONS, LENGTH, WIDTH = 3, 4, 6


class Reader:
    """Stands in for `clip.TextEncoder`: a text's numbers are those of its bytes."""

    width, length = WIDTH, LENGTH

    def __init__(self, place: str, device: str = "cpu") -> None:
        self.identity, self.shift = place, float(place == "another")
        self.width, self.device = 8 if place == "wide" else WIDTH, device

    def encode(self, texts: list[str]) -> clip.Encoded:
        pooled = [[len(each) + self.shift + i for i in range(self.width)] for each in texts]
        cut = [each for each in texts if len(each.split()) > LENGTH]
        tokens = np.repeat(np.array(pooled)[:, None], LENGTH, 1)
        return clip.Encoded(np.array(pooled, "f2"), tokens.astype("f2"), cut)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "TextEncoder", Reader)


def condition(dropout: float = 0.1, tokens: bool = True, stored: bool = True) -> text.Text:
    empty = Reader("clip").encode([""])
    packed = {"text": empty.pooled[0], "text_tokens": empty.tokens[0]}
    facts = text.described("clip", CAPTIONS, packed, 9, stored=stored)
    return text.build(text.Config(dropout=dropout, tokens=tokens), "text", facts)


def stored(num: int, count: int) -> dict[str, torch.Tensor]:
    """The k-th caption of every picture is all k + 1."""
    number = torch.arange(1, CAPTIONS + 1).half()
    return {
        "text": number[None, :, None].expand(num, -1, WIDTH),
        "text_tokens": number[None, :, None, None].expand(num, -1, LENGTH, WIDTH),
        "text_count": torch.full((num,), count),
    }


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_caption_of_those_there_are_is_drawn_at_each_visit_by_address(count: int) -> None:
    one = condition(0.0)
    told = one.drop(stored(3000, count), 1, 2, 0)
    which = told["text"][:, 0].long()
    assert torch.equal(told["text_tokens"][:, 0, 0].long(), which)
    share = torch.bincount(which, minlength=CAPTIONS + 1)[1:] / 3000
    expected = torch.tensor([1 / count] * count + [0.0] * (CAPTIONS - count))
    assert ((share - expected).abs() < 4 * (0.25 / 3000) ** 0.5).all()
    later = one.drop(stored(2000, count), 1, 2, 1000)["text"]
    assert torch.equal(later, told["text"][1000:])
    other = one.drop(stored(3000, count), 1, 3, 0)["text"]
    assert torch.equal(other, told["text"]) == (count == 1)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64])
def test_stored_texts_alone_are_encoded_when_they_are_read(reader: None, kind: torch.dtype) -> None:
    """The same draws and drops as of stored vectors, one after the other and in one batch."""
    texts = ["a", "bb\nccc", "d\nee\nfff"]
    rows = np.zeros((3, 9), np.uint8)
    for row, each in zip(rows, texts, strict=True):
        row[: len(each)] = np.frombuffer(each.encode(), np.uint8)
    count = torch.tensor([1, 2, 3])
    online = condition(0.3, stored=False)
    online.load("cpu")
    vectors = {
        key: torch.zeros(3, CAPTIONS, *each.shape).half() for key, each in online.empty.items()
    }
    for i, each in enumerate(texts):
        found = Reader("clip").encode(each.split("\n"))
        for k in range(int(count[i])):
            vectors["text"][i, k] = torch.from_numpy(found.pooled[k])
            vectors["text_tokens"][i, k] = torch.from_numpy(found.tokens[k])
    for step in range(20):
        expected = condition(0.3).drop({**vectors, "text_count": count}, 1, step, 5)
        read = {"text_utf8": torch.from_numpy(rows).to(kind), "text_count": count}
        for device in ("cpu", "cuda"):  # where all are encoded at once
            online.network.device = device  # type: ignore[union-attr]
            told = online.drop(read, 1, step, 5)
            assert told.keys() == expected.keys()
            assert all(torch.equal(told[key], expected[key]) for key in told)
    assert undropped("text", online).network is online.network  # type: ignore[attr-defined]


def test_what_is_dropped_is_told_the_empty_caption() -> None:
    one = condition(0.25)
    told, null = one.drop(stored(4000, 2), 1, 2, 0), one.null(1, "cpu")
    gone = (told["text"] == null["text"]).all(1)
    assert abs(gone.float().mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(gone, (told["text_tokens"] == null["text_tokens"]).flatten(1).all(1))
    assert torch.equal(one.default(range(2))["text"], null["text"].expand(2, -1))
    with pytest.raises(ValueError, match="give --prompt"):
        condition(0.0).default(range(2))


def test_tokens_can_be_left_out_and_stay_out() -> None:
    one = condition(tokens=False)
    assert list(one.drop(stored(2, 1), 0, 0, 0)) == list(one.null(2, "cpu")) == ["text"]
    data = Facts((1, 8, 8), Space.pixels(1), {"text": one.facts})
    again = text.build(text.Config(), "text", Facts.from_json(data.to_json()).conditions["text"])
    assert list(again.null(2, "cpu")) == ["text"]
    assert torch.equal(again.empty["text"], one.empty["text"])


def test_prompts(reader: None) -> None:
    one = condition()
    told = one.asked(["abc", "de", "abc"])
    assert told["text"][:, 0].tolist() == [3, 2, 3] and told["text_tokens"].shape == (3, 4, 6)
    assert told["text"].dtype == torch.float16 and not one.remarks
    one.asked(["a b c d e", "a b c d e", "a b c d f", "x"])
    assert one.remarks == ["the prompt 'a b c d e' and 1 more is longer than 4 tokens, and cut"]


def test_another_clip_is_refused(reader: None) -> None:
    with pytest.raises(ValueError, match=r"vectors of 8 numbers, and the network was trained on 6"):
        condition().read_by("wide")
    with pytest.raises(
        ValueError,
        match=r"another one than encoded the data.*the one that did, --text-encoder clip",
    ):
        condition().read_by("another")


def test_data_without_captions_are_refused() -> None:
    facts = text.described("clip", 1, {"text": np.ones(2, "f2")}, 3)
    with pytest.raises(ValueError, match="the data hold no captions under words"):
        text.build(text.Config(), "words", facts)
