"""Trains the tiny SAM 2.1 from random weights: `python train.py RUN_FOLDER --data FOLDER...`; the same command again goes on where it was.

Everything that is drawn at random is drawn from (seed, step), so a run that was stopped and resumed is the run that was not.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cache import Cache
from losses import Grouping
from model import DIM, build, save
from steps import Result, clip_step, picture_step
from torch import nn

log = logging.getLogger("train")


@dataclass(frozen=True)
class Stage:
    """`steps`: of this stage; `size`: of the pictures in pixels; `rate`: learning rate at its start and end; `clips`: share of steps with
    clips; `lengths`: of clips, in frames; `own_presence`: see `clip_step`."""

    name: str
    steps: int
    size: int
    rate: tuple[float, float]
    clips: float
    lengths: tuple[int, ...]
    own_presence: float
    pictures: int = 8
    points: int = 5
    clips_each: int = 2


STAGES = (
    Stage("points, 128 px", 400, 128, (1e-3, 1e-3), 0.15, (2, 3), 0.0),
    Stage("clips, 128 px", 300, 128, (1e-3, 8e-4), 0.5, (3, 4, 5), 0.3),
    Stage("256 px", 1000, 256, (8e-4, 4e-4), 0.4, (3, 4, 5), 0.5),
    Stage("clips, 256 px", 360, 256, (4e-4, 2e-5), 0.5, (4, 6, 8), 0.7),
)
WARM_UP = 60
AVERAGE = 0.998


class Run:
    """Model, its running average, optimiser and place in the schedule. `done`: steps of all stages so far."""

    def __init__(self, folder: Path, seed: int, device: str = "cpu"):
        self.folder, self.seed, self.done, self.seconds = folder, seed, 0, 0.0
        torch.manual_seed(seed)
        self.model = build(STAGES[0].size).to(device)
        self.grouping = Grouping((DIM // 8, DIM // 4, DIM)).to(device)
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.optimiser = torch.optim.AdamW(self._groups(), lr=1e-3, betas=(0.9, 0.98), fused=True)
        if self.state_file.exists():
            self._load()

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def _groups(self) -> list[dict]:
        named = [*self.model.named_parameters(), *self.grouping.named_parameters()]
        heavy = [p for name, p in named if p.ndim >= 2 and "embed" not in name and "token" not in name]
        chosen = {id(p) for p in heavy}
        return [{"params": heavy, "weight_decay": 0.02}, {"params": [p for _, p in named if id(p) not in chosen], "weight_decay": 0.0}]

    def resize(self, size: int) -> None:
        """Weights fit every size of picture, the model's constants do not."""
        if self.model.image_size == size:
            return
        other = build(size).to(self.model.device)
        other.load_state_dict(self.model.state_dict())
        moments = self.optimiser.state_dict()
        self.model = other
        self.optimiser = torch.optim.AdamW(self._groups(), lr=1e-3, betas=(0.9, 0.98), fused=True)
        self.optimiser.load_state_dict(moments)

    def update(self, loss: torch.Tensor, rate: float) -> None:
        self.optimiser.zero_grad()
        loss.backward()
        weights = [p for group in self.optimiser.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {self.done}: the gradient is not finite")
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        keep = min(AVERAGE, (self.done + 1) / (self.done + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.model.state_dict().values()), 1 - keep)

    def store(self) -> None:
        """The whole state, and the averaged weights as a checkpoint to use. Never leaves a half-written file under either name."""
        state = {
            "model": self.model.state_dict(),
            "grouping": self.grouping.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "done": self.done,
            "seconds": self.seconds,
            "size": self.model.image_size,
        }
        torch.save(state, self.folder / "state.new")
        os.replace(self.folder / "state.new", self.state_file)
        other = build()
        other.load_state_dict(self.average)
        save(other, self.folder / "sam2.new")
        os.replace(self.folder / "sam2.new", self.folder / "sam2.safetensors")

    def _load(self) -> None:
        state = torch.load(self.state_file, map_location=self.model.device, weights_only=True)
        self.resize(state["size"])
        self.model.load_state_dict(state["model"])
        self.grouping.load_state_dict(state["grouping"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.done, self.seconds = state["done"], state["seconds"]
        log.info("resumed after %d steps, %.2f hours", self.done, self.seconds / 3600)


def stage_at(step: int) -> tuple[Stage, float] | None:
    """The stage of this step and how much of it is over, 0..1. None after the last one."""
    for stage in STAGES:
        if step < stage.steps:
            return stage, step / stage.steps
        step -= stage.steps
    return None


def batch_loss(run: Run, stage: Stage, cache: Cache) -> tuple[str, Result | None]:
    rng = np.random.default_rng((run.seed, run.done))
    if rng.random() >= stage.clips:
        views = [cache.view(rng, 1, stage.size) for _ in range(stage.pictures)]
        return "points", picture_step(run.model, run.grouping, views, rng, stage.points)
    length = int(rng.choice(stage.lengths))
    views = [cache.view(rng, length, stage.size, vanishing=bool(rng.random() < 0.4)) for _ in range(stage.clips_each)]
    return "clips", clip_step(run.model, views, rng, 3, stage.own_presence)


def train(run: Run, cache: Cache, report_every: int, store_seconds: float) -> None:
    """To the end of the schedule, or until the process is asked to end; either way the state is stored."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    stored = clock = time.monotonic()
    figures: dict[str, list[dict[str, float]]] = {}
    with (run.folder / "log.jsonl").open("a") as record:
        while not asked and (now := stage_at(run.done)) is not None:
            stage, over = now
            run.resize(stage.size)
            run.model.train()
            rate = stage.rate[0] * (stage.rate[1] / stage.rate[0]) ** over * min(1.0, (run.done + 1) / WARM_UP)
            kind, result = batch_loss(run, stage, cache)
            if result is not None:
                run.update(result[0], rate)
                figures.setdefault(kind, []).append({"loss": float(result[0].detach()), **result[1]})
            run.done += 1
            before, clock = clock, time.monotonic()
            run.seconds += clock - before
            if run.done % report_every == 0:
                _report(run, stage, rate, figures, record)
                figures = {}
            if clock - stored > store_seconds:
                run.store()
                stored = clock
    run.store()


def _report(run: Run, stage: Stage, rate: float, figures: dict[str, list[dict[str, float]]], record) -> None:
    means = {kind: {name: round(float(np.mean([f[name] for f in rows])), 4) for name in rows[0]} for kind, rows in sorted(figures.items())}
    entry = {
        "step": run.done,
        "of": sum(s.steps for s in STAGES),
        "stage": stage.name,
        "rate": rate,
        "hours": round(run.seconds / 3600, 3),
        **means,
    }
    if not all(math.isfinite(row["loss"]) for row in means.values()):
        raise FloatingPointError(f"step {run.done}: the loss is not finite")
    record.write(json.dumps(entry) + "\n")
    record.flush()
    text = " | ".join(kind + " " + " ".join(f"{name} {value:.3f}" for name, value in row.items()) for kind, row in means.items())
    log.info("%d/%d %s %.2f h | %s", entry["step"], entry["of"], stage.name, entry["hours"], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of this run: state.pt, log.jsonl, sam2.safetensors")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders written by cache.py")
    parser.add_argument("--shares", type=float, nargs="+", help="how often to draw from each (equally)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report-every", type=int, default=50)
    parser.add_argument("--store-seconds", type=float, default=180)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(options.threads)
    options.run.mkdir(parents=True, exist_ok=True)
    cache = Cache(options.data, options.shares or [1.0] * len(options.data))
    train(Run(options.run, options.seed, options.device), cache, options.report_every, options.store_seconds)


if __name__ == "__main__":
    main()
