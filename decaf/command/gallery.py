"""`decaf gallery`: runs that show what the method makes of clips, as one page with moving pictures, seconds and memory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..demo import BUNDLED
from .gallery_entries import MADE_UP, Entry, read_list

_DESCRIPTION = """\
Masks several clips and writes a page about it into the folder --out: README.md, and one moving picture per clip, which shows the clip, what the
model looked at and the result. With each: seconds, memory, what was found, and J&F where the truth is known.

Without --clips the clips are made up, and the models those that come with the package, unless others are named. With --clips they are
yours, from a JSON file such as
  [{"clip": "dog.mp4", "query": "the dog that gets the ball first", "effect": "cut out", "not": "the brown dog"}]
"""

_EXAMPLES = """\
examples:
  decaf gallery --out gallery
  decaf gallery --mllm Qwen/Qwen2.5-VL-7B-Instruct --sam2 sam2.1_hiera_large.pt --clips clips.json --out gallery
"""


def add_gallery(commands, formatter) -> None:
    """Adds the subcommand to `commands`, what `add_subparsers` returned."""
    gallery = commands.add_parser(
        "gallery", formatter_class=formatter, help="a page of results with moving pictures", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    gallery.set_defaults(run=_gallery)
    gallery.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the page")
    gallery.add_argument("--clips", metavar="FILE", type=Path, help="JSON list of clips and queries of your own")
    gallery.add_argument("--mllm", metavar="DIR_OR_REPO", default=BUNDLED, help="the language model")
    gallery.add_argument("--sam2", metavar="FILE", type=Path, default=Path(BUNDLED), help="the SAM 2 checkpoint")
    gallery.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where both models run")
    gallery.add_argument("--quiet", action="store_true", help="no progress bars, no closing summary")


def _gallery(arguments: argparse.Namespace) -> int:
    from .terminal import progress_bars, say

    entries = read_list(arguments.clips) if arguments.clips is not None else list(MADE_UP)
    with progress_bars(arguments.quiet) as progress:
        told = _run(arguments, entries, progress)
    if not arguments.quiet:
        say(sys.stdout, told)
    return 0


def _run(arguments, entries: list[Entry], progress) -> str:
    import torch

    from ..bulk.clip_worker import Models
    from ..devices import choose_device
    from ..folder_lock import FolderLocks
    from ..results import files as outputs
    from .gallery_page import page, picture_name, show
    from .options import check_models, sam2_file
    from .segment import mllm_folder

    check_models(arguments.mllm, sam2_file(arguments.sam2))
    device = choose_device(arguments.device)
    outputs.prepare_folder(arguments.out)
    with FolderLocks() as locks:
        locks.take(arguments.out)
        folder = mllm_folder(arguments.mllm, progress)
        mllm, sam2 = Models(folder, sam2_file(arguments.sam2), arguments.device).load(progress)
        shown = []
        for number, entry in enumerate(entries, 1):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            shown.append(show(mllm, sam2, entry, arguments.out / picture_name(number, entry), progress))
        models = {"language model": _name(arguments.mllm), "SAM 2": _name(str(arguments.sam2))}
        (arguments.out / "README.md").write_text(page(shown, models, device), encoding="utf-8")
    return f"{len(shown)} clips shown. Look at {arguments.out / 'README.md'}."


def _name(model: str) -> str:
    """A repository id as it is; of a path, its last part: a page that is shared must not name folders of a machine."""
    return "the bundled one" if model == BUNDLED else model if model.count("/") == 1 and not Path(model).exists() else Path(model).name
