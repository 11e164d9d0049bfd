"""Command line: ``python -m workers.training.shapes train`` and ``... evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from workers.training.shapes.evaluate import Trial, evaluate
from workers.training.shapes.folder import WEIGHTS
from workers.training.shapes.train import Plan, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 if an evaluation misses the bar."""
    parser = argparse.ArgumentParser(prog="python -m workers.training.shapes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train(commands.add_parser("train", help="train the model from nothing and write its folder"))
    _add_evaluate(commands.add_parser("evaluate", help="draw held-out prompts and measure against the bar"))
    arguments = parser.parse_args(argv)
    return _train(arguments) if arguments.command == "train" else _evaluate(arguments)


def _add_train(parser: argparse.ArgumentParser) -> None:
    plan = Plan()
    parser.add_argument("--seed", type=int, default=plan.seed, help="decides data, split and weights (%(default)s)")
    parser.add_argument("--steps", type=int, default=plan.denoiser_steps, help="denoiser batches of 64 (%(default)s)")
    parser.add_argument(
        "--autoencoder-steps", type=int, default=plan.autoencoder_steps, help="batches of 16 (%(default)s)"
    )
    parser.add_argument("--text-steps", type=int, default=plan.text_steps, help="batches of 128 (%(default)s)")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder to write (%(default)s)")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path("shapes-checkpoints"),
        help="folder to resume from; give a new one for a new run (%(default)s)",
    )


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    trial = Trial()
    parser.add_argument("--folder", type=Path, default=WEIGHTS, help="the model's folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=trial.seed, help="the seed it was trained with (%(default)s)")
    parser.add_argument("--count", type=int, default=trial.count, help="prompts, 200 at most (%(default)s)")
    parser.add_argument("--steps", type=int, default=trial.steps, help="denoising steps (%(default)s)")
    parser.add_argument("--guidance", type=float, default=trial.guidance, help="guidance scale (%(default)s)")
    parser.add_argument("--pipeline", choices=("classic", "modular"), default=trial.pipeline, help="(%(default)s)")
    parser.add_argument("--wording", choices=("plain", "varied", "upper"), default=trial.wording, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=trial.threads, help="torch threads (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _train(arguments: argparse.Namespace) -> int:
    plan = Plan(
        seed=arguments.seed,
        autoencoder_steps=arguments.autoencoder_steps,
        text_steps=arguments.text_steps,
        denoiser_steps=arguments.steps,
    )
    begun = time.monotonic()
    train(plan, destination=arguments.output, checkpoints=arguments.checkpoints)
    print(f"wrote {arguments.output} after {(time.monotonic() - begun) / 60:.1f} minutes", file=sys.stderr)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    report = evaluate(
        arguments.folder,
        Trial(
            seed=arguments.seed,
            count=arguments.count,
            steps=arguments.steps,
            guidance=arguments.guidance,
            pipeline=arguments.pipeline,
            wording=arguments.wording,
            threads=arguments.threads,
        ),
    )
    print(json.dumps(report.as_json(), indent=2) if arguments.json else report.as_text())
    return 0 if report.passes else 1


if __name__ == "__main__":
    sys.exit(main())
