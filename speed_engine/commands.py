"""The commands that look at tables and finished runs: their arguments, and the calls behind them."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from speed_engine.config import RunConfig, load

if TYPE_CHECKING:
    from speed_engine.data import Facts


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with overrides allowed anywhere in it (argparse wants them together)."""
    args, rest = parser.parse_known_args()
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(late) != len(rest) or (late and not hasattr(args, "overrides")):
        parser.error(
            f"unrecognized arguments: {' '.join(w for w in rest if w not in late) or late[0]}"
        )
    if late:
        args.overrides = [*args.overrides, *late]
    return args


def config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """--config and dotted overrides."""
    parser.add_argument(
        "--config",
        default=default,
        required=default is None,
        help="a preset's name, or a YAML file",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    """--run, and the modules that the run may name."""
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of your own that the run names (my_lab.mine); it is imported, so its code runs",
    )


def _config(args: argparse.Namespace) -> RunConfig:
    return load(args.config, args.overrides)


# ------------------------------------------------------------------------------------------ doctor, plan


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def doctor(args: argparse.Namespace) -> int:
    from speed_engine.reports.doctor import run

    return run(args.json)


def plan(args: argparse.Namespace) -> int:
    from speed_engine.reports.plan import run

    return run(_config(args))


# --------------------------------------------------------------------------------------------------- table


def table_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser, default="imagenet256_dit_xl2")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="one JSON object, with all rows")
    shape.add_argument("--csv", action="store_true", help="all rows as CSV")
    parser.add_argument(
        "--compare", metavar="KIND,KIND,...", help="where each method's loss falls, by log-SNR"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="also draw (a folder without --compare)"
    )


def table(args: argparse.Namespace) -> int:
    from speed_engine.reports import plots_table, table, table_compare
    from speed_engine.training.assembly import build_table

    config = _config(args)
    form = "json" if args.json else "csv" if args.csv else "text"
    if args.compare is None:
        one = build_table(config)
        print(table.report(one, form))
        drawn = plots_table.plot_table(one, args.plot) if args.plot else []
    else:
        kinds = args.compare.split(",")
        many = table_compare.tables(config.schedule, config.objective, kinds)
        print(table_compare.compare(many, form))
        drawn = [plots_table.plot_comparison(many, args.plot)] if args.plot else []
    for path in drawn:
        print(path, file=sys.stderr)
    return 0


# -------------------------------------------------------------------------------------------------- sample


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"give a whole number from 1 up, not {text!r}")
    return int(text)


def _channels(text: str) -> int | Literal["all"]:
    return "all" if text == "all" else _at_least_one(text)


def sample_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="where the pictures go")
    parser.add_argument("--num", type=int, default=64, help="how many samples")
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", help="only this class, by number or name (default: in turn)")
    parser.add_argument(
        "--condition",
        action="append",
        default=[],
        metavar="NAME=REQUEST",
        help="what the network is told by this name, for all samples",
    )
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument(
        "--vae", help="folder or hub name of the AutoencoderKL that decodes latents"
    )
    parser.add_argument("--batch-size", type=_at_least_one, default=64)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def sample(args: argparse.Namespace) -> int:
    from speed_engine.reports.run_folder import device_of, open_run
    from speed_engine.sampling import folder, process

    run = open_run(args.run, args.trust)
    device = device_of(args.device)
    model: Any = run.model(args.weights).to(device)
    trained = process.Process.of(
        run.table().schedule,
        run.config.objective,
        run.config.learned_variance,
        run.facts.shape,
        run.conditions,
    )
    recipe = process.Recipe(
        sampler=args.sampler,
        steps=args.steps,
        shift=args.shift,
        guidance=args.guidance,
        guidance_channels=args.guidance_channels,
        clip_x0=run.facts.space.kind == "pixels",
        seed=args.seed,
    )
    asked = dict(_asked(args))
    told: dict[str, Any] = {}
    for name in asked:
        if name not in run.conditions:
            there = ", ".join(run.conditions) or "nothing"
            raise ValueError(f"the run's network is not told {name}; it is told {there}")
    for name, condition in run.conditions.items():
        one = [asked[name]] * args.num if name in asked else None
        told |= condition.default(range(args.num)) if one is None else condition.asked(one)
    decode, stored = _saved_as(run.facts, args.vae, device)
    started = time.monotonic()
    folder.sample_to_folder(
        model,
        trained,
        recipe,
        args.out,
        num=args.num,
        conditions_N=told or None,
        source={
            "weights": args.weights,
            "step": run.step,
            "config": run.config.model_dump(mode="json"),
        },
        decode=decode,
        stored=stored,
        batch_size=args.batch_size,
        device=device,
    )
    print(f"{args.num} samples in {args.out} ({time.monotonic() - started:.0f} s)")
    return 0


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


# ------------------------------------------------------------------------------------- score, plot, summary


def score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=Path, required=True, help="a folder that `sample` wrote")
    parser.add_argument("--reference", required=True, help="`digits`, or a folder of images")


def score(args: argparse.Namespace) -> int:
    from speed_engine.reports import scores

    print(json.dumps(scores.score(args.samples, args.reference), indent=1))
    return 0


def plot_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--out", type=Path, help="default: RUN/plots")


def plot(args: argparse.Namespace) -> int:
    from speed_engine.reports import plots, plots_table
    from speed_engine.reports.run_folder import open_run

    run = open_run(args.run, args.trust)
    out = args.out or args.run / "plots"
    for path in [*plots.plot_run(args.run, out), *plots_table.plot_table(run.table(), out)]:
        print(path)
    return 0


def summary_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--started", type=float, help="time.time() of the first command")


def summary(args: argparse.Namespace) -> int:
    from speed_engine.reports.summary import run

    return run(args.run, args.started, args.trust)


# ------------------------------------------------------------------------------------------ export, import


def export_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="the file or folder to write")
    parser.add_argument("--format", choices=("safetensors", "diffusers"), default="safetensors")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")


def export(args: argparse.Namespace) -> int:
    from speed_engine.reports.run_folder import open_run
    from speed_engine.weights import file as weights_file

    run = open_run(args.run, args.trust)
    model: Any = run.model(args.weights)
    if args.format == "diffusers":
        from speed_engine.weights.diffusers_folder import adapter_of_model

        with warnings.catch_warnings(action="ignore"):  # the same cautions, told here once
            cautions = adapter_of_model(model).export_diffusers(args.out, model)
        for caution in cautions:
            print(f"note: {caution}")
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        weights_file.save(args.out, model, notes={"step": run.step, "weights": args.weights})
    print(args.out)
    return 0


def import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source", type=Path, required=True, help="a public .pt, or a diffusers folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument(
        "--frequency-shift",
        type=int,
        choices=(0, 1),
        help="of a diffusers folder: 0 if it was converted from public weights (default: as diffusers computes)",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        help="classes of the label table; default: its rows but one, and the last row is the null label",
    )
    parser.add_argument(
        "--num-heads", type=int, help="of a .pt whose size is none of the published ones"
    )


def import_weights(args: argparse.Namespace) -> int:
    from speed_engine.weights import diffusers_folder, dit_public
    from speed_engine.weights import file as weights_file

    if not args.source.exists():
        raise ValueError(f"there is no file or folder {args.source}; check --source")
    if args.source.is_dir():
        if args.num_heads is not None:
            raise ValueError("a diffusers folder says its number of heads; leave out --num-heads")
        model = diffusers_folder.adapter_of_folder(args.source).import_diffusers(
            args.source, args.frequency_shift, num_classes=args.num_classes
        )
    else:
        if args.frequency_shift is not None:
            raise ValueError(
                "--frequency-shift is for diffusers folders; a .pt has the public one, 0"
            )
        model = dit_public.import_pt(
            args.source, num_classes=args.num_classes, num_heads=args.num_heads
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    weights_file.save(args.out, model, notes={"source": args.source.name})
    if not (args.source / diffusers_folder.SIDECAR).exists():  # our own folder leaves nothing open
        for sentence in dit_public.assumptions(model.facts):
            print(f"note: {sentence}")
    print(args.out)
    return 0
