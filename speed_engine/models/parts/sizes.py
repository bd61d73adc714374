"""The named sizes of a DiT."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """Width and depth of a transformer, heads of its attention, and pixels of a side of its patches."""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int


# Table 1 of the paper; the patch size is behind the slash. `tiny` is for 8x8 images on a laptop.
SIZES = {
    **{f"S/{patch}": Size(384, 12, 6, patch) for patch in (2, 4, 8)},
    **{f"B/{patch}": Size(768, 12, 12, patch) for patch in (2, 4, 8)},
    **{f"L/{patch}": Size(1024, 24, 16, patch) for patch in (2, 4, 8)},
    **{f"XL/{patch}": Size(1152, 28, 16, patch) for patch in (2, 4, 8)},
    **{f"tiny/{patch}": Size(128, 6, 4, patch) for patch in (1, 2)},
}
