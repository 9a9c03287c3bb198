"""Trains the tiny model to answer questions about scenes. Nothing is said about attention: only answers, and what a visual token shows.

  python training/mllm/train.py --run RUN --stage look --steps 1200     the vision tower alone: what does each token show?
  python training/mllm/train.py --run RUN --stage small --steps 2000    questions on small pictures and clips
  python training/mllm/train.py --run RUN --stage middle --steps 3000
  python training/mllm/train.py --run RUN --stage full --steps 1500     ... of the size that the library shows

  python training/mllm/train.py --run RUN --from decaf/demo/models/mllm --stage weak --muon --minutes 60    what weights do not know

A stage goes on from the checkpoint in RUN, in the middle of a stage too; RUN/model is then a folder that `--mllm` takes.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import signal
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from build import write_model_files
from data import COLOUR_NAMES, FLAGS, HEADINGS, SIDES, choice_question, make_batch
from model import Asker, build_model, export, load, make_fast, read, see
from muon import Muon
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from decaf.demo.painting import BACKGROUNDS, SHAPES
from decaf.demo.scenes import MOTIONS

PARTS = {"thing": 2, "shape": len(SHAPES), "colour": len(COLOUR_NAMES), "heading": len(HEADINGS), "ground": len(BACKGROUNDS)}
PARTS |= {"flags": len(FLAGS), "sides": SIDES, "change": 3, "radius": 1}
CLIP_PARTS = {"shape": len(SHAPES), "colour": len(COLOUR_NAMES), "radius": 1, "motion": len(MOTIONS), "late": 2, "change": 3}
CLIP_PARTS |= {"flags": len(FLAGS)}
"""What a visual token is told after all text layers but the last, which reads it."""

REPLAYED = 40
"""Batches that a worker holds to show again."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint, the log and the model")
    parser.add_argument("--stage", choices=("look", "small", "middle", "full", "weak"), required=True)
    parser.add_argument("--from", dest="origin", type=Path, metavar="FOLDER", help="weights to begin with, where RUN has no checkpoint yet")
    parser.add_argument("--steps", type=int, default=10**6, help="steps of this stage")
    parser.add_argument("--tokens", type=int, default=1024, help="visual tokens a step")
    parser.add_argument("--questions", type=int, default=10, help="questions a picture")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate")
    parser.add_argument("--hold", type=float, default=0.6, help="share of the steps before the rate falls")
    parser.add_argument("--floor", type=float, default=0.1, help="share of the rate that is left in the end")
    parser.add_argument("--labels", type=float, default=0.3, help="weight of the token labels beside the answers")
    parser.add_argument("--minutes", type=float, default=1e9, help="time of this stage, all starts together; the rate falls with it too")
    parser.add_argument("--warm", type=int, default=100, help="steps in which the rate rises")
    parser.add_argument("--bfloat16", action="store_true", help="sooner where the processor has such instructions, far slower where not")
    parser.add_argument("--clip-labels", type=float, default=0.3, help="the same for labels on what the text layers make of visual tokens")
    parser.add_argument("--heads", type=float, default=2.0, help="learning rate of the labels' heads, in rates of the model")
    parser.add_argument("--replay", type=float, default=0.0, help="share of batches shown before, where drawing scenes takes longest")
    parser.add_argument("--muon", action="store_true", help="matrices are updated by Muon, the rest by AdamW as without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def work(queue, seed: int, stage: str, tokens: int, questions: int, replay: float) -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    kept: list = []
    while True:
        if len(kept) == REPLAYED and rng.random() < replay:
            queue.put(kept[rng.integers(REPLAYED)])
            continue
        batch = make_batch(rng, stage, tokens, questions)
        queue.put(batch)
        kept = [*kept[-REPLAYED + 1 :], batch]


def label_loss(guess: torch.Tensor, parts: dict[str, int], labels: dict, moving: bool, hits: dict, mark: str) -> torch.Tensor:
    """Of guesses (n, sum of parts) at visual tokens. `mark`: before a label's name in `hits`."""
    guesses = dict(zip(parts, guess.float().flatten(0, -2).split(list(parts.values()), -1), strict=True))
    truth = {name: torch.from_numpy(value).to(guess.device).flatten(0, 1) for name, value in labels.items()}
    on, off = truth["thing"] == 1, truth["thing"] == 0
    where = {"thing": on | off, "shape": on, "colour": on, "ground": off}
    if moving:
        where |= {"heading": on, "change": on, "late": on, "motion": on & (truth["motion"] >= 0)}
    loss = 0
    for name, mask in where.items():
        if name not in parts or not mask.any():
            continue
        rare = name in ("change", "late")  # few tokens are of an object that comes or goes
        loss = loss + cross_entropy(guesses[name][mask], truth[name][mask], weight=_rare(parts[name], guess) if rare else None)
        told = mask & (truth[name] > 0) if rare else mask
        if told.any():
            hits[mark + name].append((guesses[name][told].argmax(-1) == truth[name][told]).float().mean().item())
    missed = (guesses["radius"][on, 0] - truth["radius"][on]).abs().mean()
    hits[mark + "radius"].append(missed.item())
    loss = loss + 5 * missed
    for name, times in (("flags", 3), ("sides", 1)):
        if name in parts:
            loss = loss + times * binary_cross_entropy_with_logits(guesses[name][on], truth[name][on])
            picked = truth[name][on] > 0.5
            if name == "flags":
                picked[:, :-2] = False  # told of the largest and the smallest: those are the hard ones
            if picked.any():
                hits[mark + name].append((guesses[name][on][picked] > 0).float().mean().item())
    return loss


def _rare(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([1.0] + [5.0] * (count - 1), device=like.device)


def main() -> None:
    given = options()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    make_fast()
    folder = given.run / "model"
    tokenizer = write_model_files(folder)
    model, asker = build_model(folder).to(given.device).train(), Asker(tokenizer)
    head = nn.ModuleList(nn.Linear(model.config.text_config.hidden_size, sum(parts.values())) for parts in (PARTS, CLIP_PARTS)).to(
        given.device
    )
    heard: list[torch.Tensor] = []  # states after all text layers but the last
    model.model.language_model.layers[-2].register_forward_hook(
        lambda *call: heard.append(call[2][0] if isinstance(call[2], tuple) else call[2])
    )
    weights = [*model.named_parameters(), *((f"head.{name}", value) for name, value in head.named_parameters())]
    decayed = [value for name, value in weights if value.ndim > 1 and "embed_tokens" not in name]
    plain = [value for name, value in weights if value.ndim < 2 or "embed_tokens" in name]
    matrices = [value for name, value in model.named_parameters() if value.ndim == 2 and "embed_tokens" not in name] if given.muon else []
    heads = list(head.parameters())
    rest, plain = ([value for value in some if not any(value is one for one in (*matrices, *heads))] for some in (decayed, plain))
    groups = [
        {"params": rest, "weight_decay": 0.05},
        {"params": plain, "weight_decay": 0.0},
        {"params": heads, "weight_decay": 0.0, "times": 5},
    ]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.98))]
    if matrices:
        optimizers.append(Muon(matrices))
    state = {"stage": "", "step": 0, "total": 0, "seconds": 0.0, "minutes": 0.0}
    kept = given.run / "checkpoint.pt"
    if kept.exists():
        saved = torch.load(kept, map_location=given.device, weights_only=True)
        model.load_state_dict(saved["model"])
        head.load_state_dict(saved["head"])
        state = saved["state"]
        if state["stage"] == given.stage and len(saved["optimizers"]) == len(optimizers):  # not if --muon was added or left out
            for optimizer, kept_state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(kept_state)
    elif given.origin is not None:
        load(model, given.origin)
    if state["stage"] != given.stage:
        state |= {"stage": given.stage, "step": 0, "minutes": 0.0}

    context = multiprocessing.get_context("fork")
    queue = context.Queue(6)
    stage = "small" if given.stage == "look" else given.stage
    questions = 0 if given.stage == "look" else given.questions
    for index in range(given.workers):
        seed = given.seed * 1000003 + state["total"] * 101 + index
        context.Process(target=work, args=(queue, seed, stage, given.tokens, questions, given.replay), daemon=True).start()
    choices = np.random.default_rng(given.seed * 7 + state["total"])
    log = (given.run / "log.txt").open("a")
    hits, losses, waited = defaultdict(list), [], 0.0
    print(f"parameters {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M", flush=True)

    def save() -> None:
        part = kept.with_suffix(".part")
        torch.save(
            {
                "model": model.state_dict(),
                "head": head.state_dict(),
                "optimizers": [one.state_dict() for one in optimizers],
                "state": state,
            },
            part,
        )
        part.replace(kept)
        export(model, folder)

    stopped: list = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    while not stopped and state["step"] < given.steps and state["minutes"] < given.minutes:
        through = max(state["step"] / given.steps, state["minutes"] / given.minutes)
        fall = max(0.0, (through - given.hold) / (1 - given.hold))
        rate = (
            given.rate * min(1, (state["step"] + 1) / given.warm) * (given.floor + (1 - given.floor) * 0.5 * (1 + math.cos(math.pi * fall)))
        )
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * (given.heads if "times" in group else 1)
        start = time.time()
        batch = queue.get(timeout=300)
        waited += time.time() - start
        heard.clear()
        # Into weights that know something, labels speak once their own heads do.
        heads_alone = given.origin is not None and state["step"] < given.warm
        with torch.autocast(given.device, torch.bfloat16, enabled=given.bfloat16):
            seen, grid = see(model, torch.from_numpy(batch.frames).to(given.device))
            loss = 0
            if questions:
                opening = len(asker.before)
                states, wanted, first = asker.states(model, seen, grid, batch.video, batch.asked)
                logits = model.lm_head(states).float()
                loss = cross_entropy(logits, wanted)
                losses.append(loss.item())
                if given.clip_labels:
                    visual = heard[0][:, opening : opening + seen.shape[1]]
                    guess = head[1](visual.detach() if heads_alone else visual)
                    loss = loss + given.clip_labels * label_loss(guess, CLIP_PARTS, batch.labels, batch.video, hits, ":")
                if state["step"] % 4 == 0:
                    states, names = read(model, asker, [choice_question(choices) for _ in range(12)])
                    chosen = model.lm_head(states).float()
                    loss = loss + 0.1 * cross_entropy(chosen, names)
                    hits["choice"].append((chosen.argmax(-1) == names)[::2].float().mean().item())
                right = (logits.argmax(-1) == wanted)[first].tolist()
                for kinds, row in zip(batch.kinds, right, strict=True):
                    for kind, hit in zip(kinds, row, strict=True):
                        hits[kind + ("" if batch.video else "'")].append(hit)
        weight = given.labels if questions else 1.0
        if weight:
            loss = loss + weight * label_loss(head[0](seen.detach() if heads_alone else seen), PARTS, batch.labels, batch.video, hits, ".")
        model.zero_grad(set_to_none=True)
        head.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([value for _, value in weights], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        state["step"] += 1
        state["total"] += 1
        state["seconds"] += time.time() - start
        state["minutes"] += (time.time() - start) / 60
        if state["step"] % 50 == 0:
            told = " ".join(f"{name} {np.mean(values[-600:]):.2f}" for name, values in sorted(hits.items()))
            line = f"{state['stage']} {state['step']} ({state['total']}) {state['seconds'] / 60:.1f} min rate {rate:.1e} "
            line += f"loss {np.mean(losses[-50:] or [loss.item()]):.3f} waited {waited:.0f} s | {told}"
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()
            hits, waited = defaultdict(list), 0.0
        if state["step"] % 200 == 0:
            save()
    save()


if __name__ == "__main__":
    main()
