"""Condition `text`: captions, encoded by a frozen CLIP, once when the data were made (`encode --text-encoder`), or
while training reads them (`--texts-only`).

What lies beside a sample, of K captions at most, in a set whose condition is called `text`:

    text          float16 [K, W]       the pooled vectors           text_count   int32 []     captions there are
    text_tokens   float16 [K, L, W]    one vector a token           text_utf8    uint8 [..]   the captions themselves,
                                       (may be left out)                                      a line each, zeros behind

The left two are not stored with `--texts-only`: 118 kB a caption of CLIP-L's 77 tokens. A caption read is then
encoded by the thread that reads, on the training device, a micro-batch at a time, with the same bits for the same
micro-batch.

The network's keywords are `text` -> float16 [B, W], the vector of one caption, drawn at each visit, and, where the data
hold it and `tokens` says so, `text_tokens` -> float16 [B, L, W]. "None" is the encoding of the empty caption. It lies
in `facts.details`, so that neither guidance nor, with stored vectors, training loads a CLIP; a prompt does.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from speed_kernels import philox
from torch import Tensor

from speed_engine.conditions.clip import TextEncoder
from speed_engine.data import ArrayFacts, ConditionFacts
from speed_engine.kinds import Section

DROP, WHICH = 0, 1  # blocks of the stream
SAME = 0.05  # by how much of its size the empty caption's vector may differ: fp16, other hardware


class Config(Section):
    """How often training forgets the caption, and how much of it the network is told."""

    kind: Literal["text"] = "text"
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="share of captions replaced by the empty one"
    )
    tokens: bool = Field(
        default=True,
        description="tell every token, where the data hold them, not the pooled vector alone",
    )
    encoder: str = Field(
        default="",
        description="folder or Hugging Face name of the CLIP, for data of encode --texts-only; empty: the name that "
        "the data tell",
    )


def described(
    encoder: str,
    captions: int,
    empty: Mapping[str, np.ndarray],
    width: int,
    name: str = "text",
    stored: bool = True,
) -> ConditionFacts:
    """What a set says of its captions.

    encoder: which CLIP, a name. captions: K. empty: of the empty caption, by array: `name` float16 [W] and, if tokens
    are told, `name`_tokens [L, W]. width: bytes of the captions themselves. stored: whether vectors lie beside them.
    """
    shapes = {key: list(each.shape) for key, each in empty.items()}
    arrays = _vectors(captions, shapes) if stored else {}
    arrays |= {
        f"{name}_count": ArrayFacts((), "int32"),
        f"{name}_utf8": ArrayFacts((width,), "uint8"),
    }
    details: dict[str, Any] = {"encoder": encoder}
    details["empty"] = {key: _packed(each) for key, each in empty.items()}
    if not stored:
        details["shapes"] = shapes
    return ConditionFacts("text", arrays, details=details)


def _vectors(captions: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, ArrayFacts]:
    return {key: ArrayFacts((captions, *shape), "float16") for key, shape in shapes.items()}


def build(config: Config, name: str, facts: ConditionFacts) -> Text:
    """Raises ValueError where the set holds no captions under this name."""
    if f"{name}_count" not in facts.arrays or "empty" not in facts.details:
        raise ValueError(
            f"conditions.{name} is text, but the data hold no captions under {name}; encode them with --text-encoder"
        )
    if shapes := facts.details.get("shapes"):
        facts = replace(facts, arrays={**facts.arrays, **_vectors(1, shapes)})
    elif config.encoder:
        raise ValueError(
            f"conditions.{name}.encoder is for data of encode --texts-only, and these hold their captions' vectors; "
            "leave it out"
        )
    tokens = f"{name}_tokens"
    if not config.tokens:
        arrays = {key: each for key, each in facts.arrays.items() if key != tokens}
        empty = {key: each for key, each in facts.details["empty"].items() if key != tokens}
        facts = replace(facts, arrays=arrays, details={**facts.details, "empty": empty})
    place = config.encoder or str(facts.details["encoder"])
    return Text(name, replace(facts, null=config.dropout > 0), config.dropout, place)


class Text:
    """See `speed_engine.conditions`: `Condition` and `Encoding`. place: of the CLIP. remarks: what became of the
    prompts, a sentence each."""

    def __init__(self, name: str, facts: ConditionFacts, dropout: float, place: str) -> None:
        self.name, self.facts, self.dropout, self.place = name, facts, dropout, place
        self.empty = {
            key: _unpacked(each, facts.arrays[key].shape[1:])
            for key, each in facts.details["empty"].items()
        }
        self.remarks: list[str] = []
        self.network: TextEncoder | None = None

    def load(self, device: torch.device | str) -> None:
        if "shapes" in self.facts.details:
            self.read_by(self.place, device, f"conditions.{self.name}.encoder=")

    def drop(
        self, arrays: Mapping[str, Tensor], seed: int, step: int, first_slot: int
    ) -> dict[str, Tensor]:
        count_B = arrays[f"{self.name}_count"].numpy()
        slot_B = np.arange(first_slot, first_slot + len(count_B))
        which_B = self._words(seed, step, slot_B, WHICH).astype(np.int64) * count_B >> 32
        dropped_B = self._words(seed, step, slot_B, DROP) < self.dropout * 2**32
        if "shapes" in self.facts.details:
            chosen = self._encoded(
                arrays[f"{self.name}_utf8"].to(torch.uint8).numpy(), which_B, dropped_B
            )
        else:
            at = torch.arange(len(count_B)), torch.from_numpy(which_B)
            chosen = {key: arrays[key][at] for key in self.empty}
        told = {}
        for key, empty in self.empty.items():
            gone = torch.from_numpy(dropped_B).view(-1, *[1] * empty.dim())
            told[key] = torch.where(gone, empty, chosen[key])
        return told

    def _encoded(
        self, utf8_BN: np.ndarray, which_B: np.ndarray, dropped_B: np.ndarray
    ) -> dict[str, Tensor]:
        """The vectors of one caption of each, by array; of what is dropped, of anything."""
        assert self.network is not None, "`load` comes before `drop`"
        captions = [bytes(row).rstrip(b"\0").decode().split("\n") for row in utf8_BN]
        drawn = zip(captions, which_B.tolist(), dropped_B.tolist(), strict=True)
        return self._vectors_of(["" if gone else its[which] for its, which, gone in drawn])

    def _vectors_of(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Of texts, by array, with the same bits whatever is said beside each."""
        assert self.network is not None
        if (
            torch.device(self.network.device).type == "cpu"
        ):  # where the number of rows decides the order of sums
            each = [self.network.encode([text]) for text in texts]
        else:
            each = [self.network.encode(texts)]
        found = {self.name: np.concatenate([one.pooled for one in each])}
        found[f"{self.name}_tokens"] = np.concatenate([one.tokens for one in each])
        return {key: torch.from_numpy(found[key]) for key in self.empty}

    @staticmethod
    def _words(seed: int, step: int, slot_B: np.ndarray, block: int) -> np.ndarray:
        return philox.first_words(seed, step, slot_B, philox.STREAM_CAPTION, block)

    def null(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        if not self.facts.null:
            raise ValueError(
                f"this network has no null {self.name}: it was trained with conditions.{self.name}.dropout=0"
            )
        return {key: each.to(device).expand(batch, *each.shape) for key, each in self.empty.items()}

    def asked(self, requests: Sequence[str]) -> dict[str, Tensor]:
        """Prompts. The CLIP is that of `read_by`, or the one of the data by its name on a hub."""
        encoder = self.network or self.read_by(self.place)
        each = list(dict.fromkeys(requests))
        # One by one: a prompt's numbers must not depend on the others, and how many there are.
        found = [encoder.encode([prompt]) for prompt in each]
        if cut := [text for one in found for text in one.cut]:
            more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
            self.remarks.append(
                f"the prompt {_short(cut[0])}{more} is longer than {encoder.length} tokens, and cut"
            )
        numbers = torch.tensor([each.index(request) for request in requests])
        told = {self.name: [one.pooled[0] for one in found]}
        told[f"{self.name}_tokens"] = [one.tokens[0] for one in found]
        return {key: torch.from_numpy(np.stack(told[key]))[numbers] for key in self.empty}

    def default(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The empty caption."""
        if self.facts.null:
            return self.null(len(numbers), "cpu")
        raise ValueError(
            f'this network must be told {self.name}; give --prompt "...", or train with '
            f"conditions.{self.name}.dropout above 0"
        )

    def read_by(
        self, place: str, device: torch.device | str = "cpu", key: str = "--text-encoder "
    ) -> TextEncoder:
        """Load the CLIP that reads prompts and captions from a folder or a hub. Raises ValueError where it is not the
        one that encoded the data. key: what the error tells a person to give."""
        encoder, empty = TextEncoder(place, device), self.empty[self.name].float()
        named = self.facts.details["encoder"]
        if encoder.width != len(empty):
            raise ValueError(
                f"the text encoder {place!r} has vectors of {encoder.width} numbers, and the network was trained on "
                f"{len(empty)}; give the one that encoded the data, {key}{named}"
            )
        found = torch.from_numpy(encoder.encode([""]).pooled[0]).float()
        if float((found - empty).norm()) > SAME * float(empty.norm()):
            raise ValueError(
                f"the text encoder {place!r} is another one than encoded the data: its empty caption has another "
                f"vector; give the one that did, {key}{named}"
            )
        self.network = encoder
        return encoder


def _short(text: str, most: int = 40) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f2").tobytes()).decode()


def _unpacked(text: Any, shape: tuple[int, ...]) -> Tensor:
    values = np.frombuffer(base64.b64decode(text), "<f2").astype(np.float16)
    return torch.from_numpy(values.reshape(shape))
