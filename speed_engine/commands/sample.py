"""`sample`: pictures from the weights of a run."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from speed_engine.commands import run_arguments
from speed_engine.commands.import_weights import foreign_arguments
from speed_engine.progress import wrapped

if TYPE_CHECKING:
    from speed_engine.data import Facts
    from speed_engine.distributed import Processes


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"give a whole number from 1 up, not {text!r}")
    return int(text)


def _channels(text: str) -> int | Literal["all"]:
    return "all" if text == "all" else _at_least_one(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser, required=False)
    parser.epilog = (
        "Many processes draw what one draws, each its share: torchrun --nproc-per-node 8 -m -- speed_engine sample ... "
        "(the -- keeps torchrun from reading --run and --num as its own), or srun. The same command continues."
    )
    parser.add_argument(
        "--weights",
        default="ema",
        help="of the run: ema (default) or model; without --run: a safetensors file of ours, a public .pt, or a "
        "diffusers folder",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="schedule.key=value", help="of weights that do not say it"
    )
    foreign_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="where the pictures go")
    parser.add_argument(
        "--num", type=int, help="how many samples (default 64, or all pictures of --low-resolution)"
    )
    parser.add_argument("--sampler", default="ddpm", help="ddpm, ddim, dpmpp, heun, or a module")
    parser.add_argument("--steps", type=int, default=250, help="noise levels that are visited")
    parser.add_argument(
        "--shift",
        type=float,
        default=1.0,
        help="of rectified flow: above 1 takes more levels at high noise",
    )
    parser.add_argument("--guidance", type=float, default=1.0, help="1 = off")
    parser.add_argument(
        "--guidance-channels",
        type=_channels,
        default="all",
        help="all, or a number (3: as the released DiT)",
    )
    parser.add_argument(
        "--guidance-power",
        type=float,
        default=0.0,
        help="above 0: guidance grows from 1 at pure noise to its whole value (MDT: 4)",
    )
    parser.add_argument(
        "--no-clip",
        dest="clip",
        action="store_false",
        help="leave what pixels cannot be in the chain, as EDM's sampler does; latents are never clipped",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", help="only this class, by number or name (default: in turn)")
    parser.add_argument(
        "--condition",
        action="append",
        default=[],
        metavar="NAME=REQUEST",
        help="what the network is told by this name, for all samples",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="of a network told captions; given several times: the samples take them in turn",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="the same from a file, a prompt a line"
    )
    parser.add_argument(
        "--text-encoder",
        metavar="CLIP",
        help="folder or hub name of the CLIP that reads prompts (default: the one that the data name)",
    )
    parser.add_argument(
        "--low-resolution",
        type=Path,
        metavar="DIR",
        help="of a network that sharpens: a folder of pictures, whose names the samples get, or an encoded set",
    )
    parser.add_argument(
        "--low-resolution-noise",
        type=float,
        default=0.0,
        metavar="LEVEL",
        help="noise that is put into them, and told (0 to the conditions.image.noise of training; default 0)",
    )
    parser.add_argument(
        "--vae", help="folder or hub name of the AutoencoderKL that decodes latents"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the network's weights and products; the chain itself stays in fp32",
    )
    parser.add_argument("--batch-size", type=_at_least_one, default=64, help="of each process")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it


def run(args: argparse.Namespace) -> int:
    """Draw; started by torchrun, each process draws its share."""
    from speed_engine import distributed
    from speed_engine.training.library_log import libraries_apart

    with _processes(args.device) as processes, libraries_apart(processes.rank) as log:
        drawn = _draw(args, processes)
        log.into(args.out)
        if processes.first:
            print(wrapped(drawn))
        distributed.stop(together=True)
    return 0


@contextlib.contextmanager
def _processes(device: str) -> Iterator[Processes]:
    """The processes that a launcher started, or this one alone; they leave together or, after a failure, at once."""
    from speed_engine import distributed
    from speed_engine.reports.run_folder import device_of

    found = device_of(device)
    if distributed.place(os.environ) is None:
        yield distributed.Processes(0, 1, 0, found)
        return
    try:
        yield distributed.start(device)
    except RuntimeError as error:
        if distributed.lost_connection(error):
            met = not isinstance(error, distributed.NotMet)
            words = "another process has gone" if met else str(error)
            raise ValueError(f"{words}; the same command continues") from error
        raise
    finally:
        distributed.stop(together=False)


def _draw(args: argparse.Namespace, processes: Processes) -> str:
    """Draw this process's share. Returns the last line, for people."""
    import torch

    from speed_engine.sampling import folder, process

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    device = processes.device
    started = time.monotonic()
    # Reads files and refuses; whatever it refuses is told once.
    asked = processes.attempt(lambda: _asked_for(args, processes))
    network, (decode, stored) = asked.network, asked.saved_as
    recipe = process.Recipe(
        sampler=args.sampler,
        steps=args.steps,
        shift=args.shift,
        guidance=args.guidance,
        guidance_power=args.guidance_power,
        guidance_channels=args.guidance_channels,
        clip_x0=args.clip and network.facts.space.kind == "pixels",
        seed=args.seed,
    )
    folder.sample_to_folder(
        network.model.to(device, dtype),
        network.process,
        recipe,
        args.out,
        num=asked.num,
        conditions_N=asked.told or None,
        names=asked.names,
        source=asked.source,
        decode=decode,
        stored=stored,
        batch_size=args.batch_size,
        device=device,
        dtype=dtype,
        processes=processes,
        show_progress=sys.stdout.isatty(),
    )
    by = f", {processes.world} processes" if processes.world > 1 else ""
    return f"{asked.num} samples in {args.out} ({time.monotonic() - started:.0f} s{by})"


class _Asked(NamedTuple):
    """The network, what it is told of each sample, how samples are saved, where they are from, what they are called."""

    network: Any
    num: int
    told: dict[str, Any]
    saved_as: Any
    source: dict[str, Any]
    names: list[str] | None


def _asked_for(args: argparse.Namespace, processes: Processes) -> _Asked:
    from speed_engine.reports import trained

    if args.run is None:
        foreign = {
            "num_classes": args.num_classes,
            "num_heads": args.num_heads,
            "frequency_shift": args.frequency_shift,
        }
        if args.weights in ("ema", "model"):
            raise ValueError("give --run, a run folder, or --weights, a file or folder of weights")
        network = trained.of_file(Path(args.weights), args.overrides, args.trust, **foreign)
    elif args.weights not in ("ema", "model"):
        raise ValueError(
            f"--weights {args.weights}: of a run it is ema or model; leave out --run to take a file"
        )
    elif args.overrides:
        raise ValueError(f"a run says how it was trained; leave out {args.overrides[0]}")
    else:
        network = trained.of_run(args.run, args.weights, args.trust)
    for remark in network.remarks:
        if processes.first:
            print(wrapped(f"note: {remark}"))
    conditions = network.process.conditions
    asked: dict[str, list[str]] = {name: [request] for name, request in _asked(args)}
    prompts = [*args.prompt, *(prompts_of(args.prompts) if args.prompts else ())]
    if prompts or args.text_encoder is not None:
        name = _read_by(conditions, args, processes)
        if prompts:
            asked[name] = prompts
    given = _sharpened(conditions, args, processes.device)
    num, told = (given.num, given.told) if given else (64 if args.num is None else args.num, {})
    for name in asked:
        if name not in conditions:
            there = ", ".join(conditions) or "nothing"
            raise ValueError(f"the network is not told {name}; it is told {there}")
    for name, condition in conditions.items():
        if name in asked:
            told |= condition.asked([asked[name][i % len(asked[name])] for i in range(num)])
        elif given is None:
            told |= condition.default(range(num))
        elif name not in told and not condition.facts.null:  # classes in turn would be wrong ones
            raise ValueError(
                f"this network must be told {name}, which {args.low_resolution} does not say; give --condition "
                f"{name}=..., or an encoded set"
            )
        for remark in getattr(condition, "remarks", ()):
            if processes.first:
                print(wrapped(f"note: {remark}"))
    source = {**network.source, "prompts": prompts} if prompts else network.source
    saved_as = _saved_as(network.facts, args.vae, processes.device)
    return _Asked(network, num, told, saved_as, source, given.names if given else None)


def _sharpened(conditions: Any, args: argparse.Namespace, device: Any) -> Any:
    """What `--low-resolution` asks for; None where it is not there."""
    if args.low_resolution is None:
        if args.low_resolution_noise:
            raise ValueError("--low-resolution-noise belongs to --low-resolution; leave it out")
        return None
    from speed_engine.sampling import low_resolution

    return low_resolution.asked(
        args.low_resolution.expanduser(),
        conditions,
        num=args.num,
        level=args.low_resolution_noise,
        seed=args.seed,
        vae=args.vae,
        device=device,
    )


def prompts_of(file: Path) -> list[str]:
    """A prompt a line, without empty lines. Raises ValueError."""
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise ValueError(f"{file} cannot be read ({reason}); check --prompts") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{file} holds no prompt; write one a line")
    return found


def _read_by(conditions: Any, args: argparse.Namespace, processes: Processes) -> str:
    """The name of the condition that takes prompts, which reads them with `--text-encoder` from now on."""
    from speed_engine.conditions.text import Text

    for name, condition in conditions.items():
        if isinstance(condition, Text):
            if args.text_encoder is not None:
                condition.read_by(args.text_encoder, processes.device)
            return name
    there = ", ".join(conditions) or "nothing"
    raise ValueError(
        f"--prompt, --prompts and --text-encoder are for networks that are told captions; this one is told {there}"
    )


def _saved_as(facts: Facts, vae: str | None, device: Any) -> tuple[Any, Any]:
    """(the way from model space to pictures, or to the arrays that `encode --arrays` takes); None: pixels as they are.

    Raises ValueError for latents of pictures without their VAE, and for a VAE with what is no latent of a picture.
    """
    from speed_engine.data import autoencoder
    from speed_engine.sampling import folder

    latents, flat = facts.space.kind == "latents", len(facts.shape) == 3
    if vae is not None and flat and latents:
        return autoencoder.decoder(facts.space, vae, device), None
    if vae is not None:
        raise ValueError(
            f"--vae decodes latents of pictures, and the run's samples are {facts.space.kind} of the shape "
            f"{list(facts.shape)}; leave it out"
        )
    if latents and flat:
        by = facts.space.vae
        raise ValueError(
            "the run was trained on latents; give --vae, the folder of its AutoencoderKL"
            f"{f' (its data were encoded by {by})' if by else ''}"
        )
    if flat and facts.shape[0] in (1, 3):
        return None, None
    return None, facts.space.to_stored if latents else folder.as_bytes


def _asked(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(condition, what is asked of it) of `--label` and every `--condition`."""
    if args.label is not None:
        yield "label", args.label
    for text in args.condition:
        name, equals, request = text.partition("=")
        if not equals or not name:
            raise ValueError(f"cannot read --condition {text}; write it as NAME=REQUEST")
        yield name, request
