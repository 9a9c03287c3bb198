"""Finding a model that is named by its folder or its repository, and fetching it when the user asked for that."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from ..errors import DecafError
from ..report import Progress, Report, silent
from .folder import missing_files

log = logging.getLogger(__name__)

DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
"""Files fetched from a repository: weights, configuration, tokenizer. Never code, never pickled weights."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def find_mllm(name: str | Path, progress: Progress | Report = silent) -> Path:
    """The local folder of a model that is named by its folder or by a repository id such as "Qwen/Qwen2.5-VL-7B-Instruct".

    A repository is looked for in the local hub cache first, without any connection; it is downloaded only if it is not there.

    Raises DecafError when it is neither a folder nor a repository that can be had.
    """
    folder = Path(os.path.expanduser(name))  # unlike Path's own, it leaves the home of an unknown user as it stands
    if os.path.isdir(folder):
        return folder
    repo = str(name)
    if not _REPOSITORY.fullmatch(repo):
        raise DecafError(f"There is no model folder {name}. Give a folder that holds config.json, or a repository id like owner/model.")
    if os.path.lexists(repo.split("/")[0]):  # a mistyped folder is not looked for on the network
        raise DecafError(
            f"There is no model folder {name}, although {repo.split('/')[0]} is there. Correct the folder's name; if you mean the repository "
            f"{repo}, run the command in another folder or download the model there by hand."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(repo, allow_patterns=DOWNLOADED, local_files_only=True))
        if not missing_files(cached):
            return cached
    except (LocalEntryNotFoundError, ValueError, OSError):
        log.debug("%s is not in the local cache", repo)
    return download_mllm(repo, None, progress)


def download_mllm(repo: str, folder: Path | None, progress: Progress | Report = silent) -> Path:
    """Download a repository's weights, configuration and tokenizer into `folder` (None: the hub's own cache) and return where they are.

    `progress` counts bytes and may raise to stop; finished files are kept, and a later call goes on from them.
    Raises DecafError when the repository cannot be reached or does not exist.
    """
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    sized, report = [], Report.of(progress)

    class Bar(tqdm):
        """Reports instead of drawing. The hub counts bytes in one bar and files in another; older ones count files alone."""

        def __init__(self, *args, **kwargs):
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere()})
            if self.unit == "B":
                sized.append(self)

        def update(self, n=1):
            result = super().update(n)
            shown = sized[-1] if sized else self
            if shown.total:
                report.progress(int(min(shown.n, shown.total)), int(shown.total), f"Downloading {repo}")
            return result

    try:
        return Path(snapshot_download(repo, local_dir=folder, allow_patterns=DOWNLOADED, tqdm_class=Bar))
    except Exception as error:  # connection errors, unknown repositories, a full disk: each library below has kinds of its own
        if report.cancelled_by(error):
            raise
        where = f"into {folder}" if folder else "into the local cache"
        raise DecafError(
            f"{repo} could not be downloaded {where}: {str(error).splitlines()[0] if str(error) else type(error).__name__} "
            "Check the name and the connection, or copy the model's folder there by hand."
        ) from error


class _Nowhere:
    def write(self, text):
        return len(text)

    def flush(self):
        return None
