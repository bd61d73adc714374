"""TensorBoard and Weights & Biases: the same numbers and pictures elsewhere. A board that fails never stops training.

What a board raises, whether it is opened, written to or closed, becomes one warning; it gets nothing more of this run.
Only a package that is not installed is a user's mistake.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from speed_engine.atomic_files import write_text
from speed_engine.config import RunConfig

WANDB_ID = "wandb_id"  # the file of the run folder that names its run at W&B


class Board(Protocol):
    """Where a run is watched."""

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """The scalars of a line of metrics."""
        ...

    def picture(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        """A uint8 picture of 3 channels."""
        ...

    def rewind(self, step: int) -> str | None:
        """The run goes back to `step`: forget what came after. Returns what a person is to be told where it cannot."""
        ...

    def close(self) -> None: ...


class Boards:
    """Those that were asked for and have not failed. say: tells the person who watches."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.open: dict[str, Board] = {}

    def add(self, name: str, make: Callable[[], Board]) -> None:
        """Open one more."""
        self._guarded(name, lambda: self.open.update({name: make()}))

    def each(self, action: Callable[[Board], None]) -> None:
        """`action` with every board."""
        for name, board in list(self.open.items()):
            self._guarded(name, lambda board=board: action(board))

    def rewind(self, step: int) -> None:
        """See `Board.rewind`."""

        def back(board: Board) -> None:
            if remark := board.rewind(step):
                self.say(f"WARNING: {remark}")

        self.each(back)

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service comes up with
            self.open.pop(name, None)
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.say(
                f"WARNING: {name} failed ({text}) and gets nothing more of this run; training goes on"
            )


def open_boards(
    run: Path, first_step: int, config: RunConfig, say: Callable[[str], None]
) -> Boards:
    """The boards that `config.log` asks for. Raises ValueError where a package is missing."""
    boards = Boards(say)
    if config.log.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("log.tensorboard=true needs: pip install tensorboard") from error
        folder = str(run / "tensorboard")
        boards.add(
            "TensorBoard",
            lambda: TensorBoard(
                lambda step: SummaryWriter(folder, purge_step=step + 1), first_step
            ),
        )
    if config.log.wandb:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("log.wandb=true needs: pip install wandb") from error
        boards.add("W&B", lambda: WandB(wandb, run, config))
    return boards


class TensorBoard:
    """See `Board`. writer_after(step): a SummaryWriter that hides what the folder holds of later steps.

    An interrupted run, or one that goes back, writes these again.
    """

    def __init__(self, writer_after: Callable[[int], Any], step: int) -> None:
        self.writer_after = writer_after
        self.writer = writer_after(step)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        self.writer.add_image(name, pixels_HWC, step, dataformats="HWC")

    def rewind(self, step: int) -> None:
        self.writer.close()
        self.writer = self.writer_after(step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """See `Board`. The id in the run folder makes a resumed run go on in the same run there.

    W&B passes over what is sent of steps that it has seen. A resume makes the same numbers again; a run that goes back
    without some data makes others, and says so.
    """

    def __init__(self, package: Any, run: Path, config: RunConfig) -> None:
        path = run / WANDB_ID
        if not path.exists():
            write_text(path, secrets.token_hex(8) + "\n")
        self.package = package
        self.session = package.init(
            dir=str(run),
            project=config.log.wandb_project,
            group=config.log.wandb_group,
            name=config.log.wandb_name or run.name,
            id=path.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=config.model_dump(mode="json"),
        )

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self.session.log(dict(values), step=step)

    def picture(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        self.session.log({name: self.package.Image(pixels_HWC)}, step=step)

    def rewind(self, step: int) -> str:
        return (
            f"W&B keeps its points of the steps after {step}, which are trained again on other data; metrics.jsonl has "
            "the new ones"
        )

    def close(self) -> None:
        self.session.finish()
