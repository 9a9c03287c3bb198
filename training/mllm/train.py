"""Trains the tiny model to answer questions about scenes. Nothing is said about attention: only answers, and what a visual token shows.

  python training/mllm/train.py --run RUN --stage look --steps 1200     the vision tower alone: what does each token show?
  python training/mllm/train.py --run RUN --stage small --steps 2000    questions on small pictures and clips
  python training/mllm/train.py --run RUN --stage middle --steps 3000
  python training/mllm/train.py --run RUN --stage full --steps 1500     ... of the size that the library shows

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
from model import Asker, build_model, export, make_fast, read, see
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from decaf.demo.painting import BACKGROUNDS, SHAPES

PARTS = {"thing": 2, "shape": len(SHAPES), "colour": len(COLOUR_NAMES), "heading": len(HEADINGS), "ground": len(BACKGROUNDS)}
PARTS |= {"flags": len(FLAGS), "sides": SIDES}

REPLAYED = 40
"""Batches that a worker holds to show again."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint, the log and the model")
    parser.add_argument("--stage", choices=("look", "small", "middle", "full"), required=True)
    parser.add_argument("--steps", type=int, required=True, help="steps of this stage")
    parser.add_argument("--tokens", type=int, default=1024, help="visual tokens a step")
    parser.add_argument("--questions", type=int, default=10, help="questions a picture")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate")
    parser.add_argument("--hold", type=float, default=0.6, help="share of the steps before the rate falls")
    parser.add_argument("--floor", type=float, default=0.1, help="share of the rate that is left in the end")
    parser.add_argument("--labels", type=float, default=0.3, help="weight of the token labels beside the answers")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time; the stage can be gone on with")
    parser.add_argument("--muon", action="store_true", help="matrices are updated by Muon, the rest by AdamW as without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def work(queue, seed: int, stage: str, tokens: int, questions: int) -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    kept: list = []
    while True:
        # Scenes take longer to draw than to learn from: each batch is shown about three times, with others in between.
        if len(kept) == REPLAYED and rng.random() < 0.67:
            queue.put(kept[rng.integers(REPLAYED)])
            continue
        batch = make_batch(rng, stage, tokens, questions)
        queue.put(batch)
        kept = [*kept[-REPLAYED + 1 :], batch]


def label_loss(head: nn.Module, seen: torch.Tensor, labels: dict, moving: bool, hits: dict) -> torch.Tensor:
    guess = dict(zip(PARTS, head(seen.float()).split(list(PARTS.values()), -1), strict=True))
    device = seen.device
    truth = {name: torch.from_numpy(value).to(device) for name, value in labels.items()}
    on, off, told = truth["thing"] == 1, truth["thing"] == 0, truth["thing"] >= 0
    where = {"thing": told, "shape": on, "colour": on, "ground": off} | ({"heading": on} if moving else {})
    loss = 0
    for name, mask in where.items():
        loss = loss + cross_entropy(guess[name][mask], truth[name][mask])
        hits["." + name].append((guess[name][mask].argmax(-1) == truth[name][mask]).float().mean().item())
    for name in ("flags", "sides"):
        loss = loss + binary_cross_entropy_with_logits(guess[name][on], truth[name][on])
    hits[".flags"].append(((guess["flags"][on] > 0) == (truth["flags"][on] > 0.5)).float().mean().item())
    picked = truth["sides"][on] > 0.5
    hits[".sides"].append((guess["sides"][on][picked] > 0).float().mean().item() if picked.any() else 0.0)
    return loss


def main() -> None:
    given = options()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    make_fast()
    folder = given.run / "model"
    tokenizer = write_model_files(folder)
    model, asker = build_model(folder).to(given.device).train(), Asker(tokenizer)
    head = nn.Linear(model.config.text_config.hidden_size, sum(PARTS.values())).to(given.device)
    weights = [*model.named_parameters(), *((f"head.{name}", value) for name, value in head.named_parameters())]
    decayed = [value for name, value in weights if value.ndim > 1 and "embed_tokens" not in name]
    plain = [value for name, value in weights if value.ndim < 2 or "embed_tokens" in name]
    matrices = [value for value in decayed if value.ndim == 2] if given.muon else []
    rest = [value for value in decayed if not any(value is one for one in matrices)]
    optimizers = [torch.optim.AdamW([{"params": rest, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98))]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    state = {"stage": "", "step": 0, "total": 0, "seconds": 0.0}
    kept = given.run / "checkpoint.pt"
    if kept.exists():
        saved = torch.load(kept, map_location=given.device, weights_only=True)
        model.load_state_dict(saved["model"])
        head.load_state_dict(saved["head"])
        state = saved["state"]
        if state["stage"] == given.stage and len(saved["optimizers"]) == len(optimizers):  # not if --muon was added or left out
            for optimizer, kept_state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(kept_state)
    if state["stage"] != given.stage:
        state |= {"stage": given.stage, "step": 0}

    context = multiprocessing.get_context("fork")
    queue = context.Queue(6)
    stage = "small" if given.stage == "look" else given.stage
    questions = 0 if given.stage == "look" else given.questions
    for index in range(given.workers):
        seed = given.seed * 1000003 + state["total"] * 101 + index
        context.Process(target=work, args=(queue, seed, stage, given.tokens, questions), daemon=True).start()
    choices = np.random.default_rng(given.seed * 7 + state["total"])
    log = (given.run / "log.txt").open("a")
    hits, losses, waited, began = defaultdict(list), [], 0.0, time.time()
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
    while not stopped and state["step"] < given.steps and time.time() - began < given.minutes * 60:
        through = state["step"] / given.steps
        fall = max(0.0, (through - given.hold) / (1 - given.hold))
        rate = given.rate * min(1, (state["step"] + 1) / 100) * (given.floor + (1 - given.floor) * 0.5 * (1 + math.cos(math.pi * fall)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        start = time.time()
        batch = queue.get()
        waited += time.time() - start
        with torch.autocast(given.device, torch.bfloat16):
            seen, grid = see(model, torch.from_numpy(batch.frames).to(given.device))
            loss = 0
            if questions:
                states, wanted, first = asker.states(model, seen, grid, batch.video, batch.asked)
                logits = model.lm_head(states).float()
                loss = cross_entropy(logits, wanted)
                losses.append(loss.item())
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
            loss = loss + weight * label_loss(head, seen, batch.labels, batch.video, hits)
        model.zero_grad(set_to_none=True)
        head.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([value for _, value in weights], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        state["step"] += 1
        state["total"] += 1
        state["seconds"] += time.time() - start
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
