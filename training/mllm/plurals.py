"""Teaches the tiny model its plurals and numbers, and touches nothing else.

  python training/mllm/plurals.py --from decaf/demo/models/mllm --to FOLDER --minutes 30

" stars" is one token, which scenes with several stars alone could teach: it meant something else than " star" in the end. Here it begins as " star",
and only the embeddings of such words are trained. So every figure about queries without these words stays as it is, to the last digit.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from data import TEMPLATES, draw_scene, draw_shape, shown
from model import Asker, build_model, export, load, make_fast, see
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, linear

from decaf.attention.questions import clean_query
from decaf.demo.asking import NUMBERS, Query, answer_to, plural
from decaf.demo.painting import SHAPES
from decaf.demo.scenes import Scene

Asked = tuple[str, str]
"""A question and its answer."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="origin", type=Path, required=True, metavar="FOLDER", help="the model's folder")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="for the same model with the new words")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--tokens", type=int, default=1024, help="visual tokens a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate; falls to nothing")
    parser.add_argument("--leash", type=float, default=0.0, help="weight of the squared distance of plurals from their singulars")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def words(tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """Tokens of the plurals, of their singulars, and of the words of number before them."""

    def last(text: str) -> int:
        return tokenizer.encode(text, add_special_tokens=False).ids[-1]

    return [last(f"the {plural(shape)}") for shape in SHAPES], [last(f"the {shape}") for shape in SHAPES], [
        last("all"), *(last(f"the {number}") for number in NUMBERS)
    ]  # fmt: skip


def questions(rng: np.random.Generator, scene: Scene, frame: int | None) -> list[Asked]:
    """About every shape of which several are there, and about one of which none is; `frame`: the one shown alone, else the whole clip is."""
    shapes = [thing.shape for thing in scene.things]
    found = []
    for shape in SHAPES:
        same = tuple(index for index, name in enumerate(shapes) if name == shape)
        if len(same) == 1 or len(same) > len(NUMBERS) + 1:
            continue
        if same and frame is not None and not scene.masks[list(same), frame].any((1, 2)).all():
            continue
        number = NUMBERS[len(same) - 2] if same else str(rng.choice(NUMBERS))
        for text in (f"all {plural(shape)}", f"the {number} {plural(shape)}"):
            query = Query("counting" if same else "absent", text, same)
            found.append((bool(same), (TEMPLATES.ask_object(clean_query(text)), answer_to(query, scene.things))))
            found.append((bool(same), (TEMPLATES.ask_presence(clean_query(text)), "yes" if same else "no")))
    there, missing = ([pair for here, pair in found if here is wanted] for wanted in (True, False))
    return there + [missing[index] for index in rng.permutation(len(missing))[:3]]


def batch(rng: np.random.Generator, tokens: int) -> tuple[np.ndarray, bool, list[Asked]]:
    """One clip or picture (1, T, H, W, 3), whether it is a clip, and its questions. About `tokens` visual tokens at most."""
    while True:
        video, rows, cols, length = draw_shape(rng, "full")
        if rows * cols * (1 if video else 4) * ((length + 1) // 2) > tokens:
            continue
        scene = draw_scene(rng, "full", rows, cols, length if video else int(rng.choice([1, 8])))
        frame = None if video else int(rng.integers(len(scene.frames)))
        asked = questions(rng, scene, frame)
        if len(asked) > 3:  # else nothing but what is missing
            return (scene.frames if video else shown(scene.frames[frame], 2)[None])[None], video, asked


def main() -> None:
    given = options()
    torch.set_num_threads(given.threads)
    make_fast()
    shutil.copytree(given.origin, given.to, dirs_exist_ok=True)
    model = build_model(given.to)
    load(model, given.origin)
    tokenizer = Tokenizer.from_file(str(given.to / "tokenizer.json"))
    asker = Asker(tokenizer)
    plurals, singulars, numbers = words(tokenizer)
    model.requires_grad_(False)
    table = model.get_input_embeddings().weight
    table[plurals] = table[singulars]
    start = table[plurals].clone()
    output = table.clone()  # what is answered reads the table as it was: none of these words is ever an answer
    table.requires_grad_(True)
    others = torch.ones(len(table), dtype=torch.bool)
    others[[*plurals, *numbers]] = False
    optimizer = torch.optim.Adam([table], lr=given.rate, betas=(0.9, 0.98))
    rng = np.random.default_rng(given.seed)
    began, step, hits, losses = time.time(), 0, [], []
    while (through := (time.time() - began) / 60 / given.minutes) < 1:
        optimizer.param_groups[0]["lr"] = given.rate * 0.5 * (1 + math.cos(math.pi * through))
        for _ in range(4):
            frames, video, asked = batch(rng, given.tokens)
            with torch.no_grad():
                seen, grid = see(model, torch.from_numpy(frames.copy()))
            states, wanted, first = asker.states(model, seen, grid, video, [asked])
            logits = linear(states, output)
            loss = cross_entropy(logits, wanted) + given.leash * (table[plurals] - start).square().sum(-1).mean()
            (loss / 4).backward()
            losses.append(loss.item())
            hits += [(answer, hit) for (_, answer), hit in zip(asked, (logits.argmax(-1) == wanted)[first][0].tolist(), strict=True)]
        table.grad[others] = 0
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 25 == 0:
            kinds = {"yes": [], "no": [], "none": [], "name": []}
            for answer, hit in hits:
                kinds.get(answer, kinds["name"]).append(hit)
            told = " ".join(f"{name} {np.mean(some):.2f}" for name, some in kinds.items() if some)
            moved = (table[plurals] - start).norm(dim=-1).mean().item()
            print(f"{step} {(time.time() - began) / 60:.1f} min loss {np.mean(losses):.3f} moved {moved:.2f} | {told}", flush=True)
            hits, losses = [], []
            export(model, given.to)
    export(model, given.to)


if __name__ == "__main__":
    main()
