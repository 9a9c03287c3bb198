"""From a folder or a repository id to a loaded model. Only what the user names is loaded or downloaded, and only safetensors."""

from __future__ import annotations

import importlib
import json
import logging
import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from ..devices import usable_device
from ..errors import DecafError
from ..progress import Progress, silent
from . import families
from .base import MLLM, Family

log = logging.getLogger(__name__)

DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
"""Files fetched from a repository: weights, configuration, tokenizer. Never code, never pickled weights."""


@cache
def registry() -> dict[str, Family]:
    """Families by the `model_type` of their models' config.json."""
    found = [importlib.import_module(f"{families.__name__}.{entry.name}").FAMILY for entry in pkgutil.iter_modules(families.__path__)]
    return {model_type: family for family in found for model_type in family.model_types}


def find_mllm(name: str | Path, progress: Progress = silent) -> Path:
    """The local folder of a model that is named by its folder or by a repository id such as "Qwen/Qwen2.5-VL-7B-Instruct".

    A repository is looked for in the local hub cache first, without any connection; it is downloaded only if it is not there.

    Raises DecafError when it is neither a folder nor a repository that can be had.
    """
    folder = Path(os.path.expanduser(name))  # unlike Path's own, it leaves the home of an unknown user as it stands
    if os.path.isdir(folder):
        return folder
    repo = str(name)
    if repo.count("/") != 1 or repo.startswith(("/", ".", "~")) or "\\" in repo:
        raise DecafError(f"There is no model folder {name}. Give a folder that holds config.json, or a repository id like owner/model.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(repo, allow_patterns=DOWNLOADED, local_files_only=True))
        if not missing_files(cached):
            return cached
    except (LocalEntryNotFoundError, ValueError, OSError):
        log.debug("%s is not in the local cache", repo)
    return download_mllm(repo, None, progress)


def download_mllm(repo: str, folder: Path | None, progress: Progress = silent) -> Path:
    """Download a repository's weights, configuration and tokenizer into `folder` (None: the hub's own cache) and return where they are.

    `progress` counts bytes and may raise to stop; finished files are kept, and a later call goes on from them.
    Raises DecafError when the repository cannot be reached or does not exist.
    """
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    sized = []

    class Bar(tqdm):
        """Reports to `progress` instead of drawing. The hub counts bytes in one bar and files in another; older ones count files alone."""

        def __init__(self, *args, **kwargs):
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere()})
            if self.unit == "B":
                sized.append(self)

        def update(self, n=1):
            result = super().update(n)
            shown = sized[-1] if sized else self
            if shown.total:
                progress(int(min(shown.n, shown.total)), int(shown.total), f"Downloading {repo}")
            return result

    try:
        return Path(snapshot_download(repo, local_dir=folder, allow_patterns=DOWNLOADED, tqdm_class=Bar))
    except (OSError, ValueError) as error:  # connection errors, unknown repositories, a full disk
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


def missing_files(folder: Path) -> list[str]:
    """Names of files that a complete model folder would have and this one has not."""
    missing = [name for name in ("config.json",) if not (folder / name).is_file()]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing += sorted(name for name in shards if not (folder / name).is_file())
        except (ValueError, KeyError, TypeError, AttributeError):  # damaged counts as missing
            missing.append(index.name)
    elif not (folder / "model.safetensors").is_file():
        missing.append("model.safetensors")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        missing.append("tokenizer.json")
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        missing.append("preprocessor_config.json")
    return missing


def load_mllm(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, progress: Progress = silent
) -> MLLM:
    """Load a multimodal LLM from a local folder in the hub's format. Nothing is fetched and no code from the folder is run.

    Args:
        folder: holds config.json, *.safetensors, tokenizer and processor files.
        dtype: of the weights; None takes float32 on a CPU and bfloat16 elsewhere. Maps are float32 in any case.

    Raises DecafError for a folder that is missing, incomplete, damaged, text-only, or of a family that is not supported, and for a device
    that is not there.
    """
    folder, device = Path(folder), usable_device(device)
    progress(0, 2, f"Loading {folder.name}")
    family = _family_of(folder)
    _check_weights(folder)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..rollout import CAPTURE

    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with _explained(folder):
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    progress(1, 2, f"Loading {folder.name}")
    with _explained(folder):
        # Weights of another shape are let through here to be named below.
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    _check_loaded(folder, info)
    model.eval().requires_grad_(False)
    family.prepare(model)
    mllm = MLLM(model.to(device), processor, family, folder.name)
    _check_processor(mllm, folder)
    # The vision tower keeps the fast kernels: only the text tower's attention is looked at.
    mllm.text_tower.set_attn_implementation(CAPTURE)
    progress(2, 2, f"Loading {folder.name}")
    return mllm


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Names the folder in whatever transformers raises about the files in it: there is no error that damaged files do not raise somewhere."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ImportError as error:  # quantised weights
        raise DecafError(
            f"The model in {folder} cannot be loaded: {_first_line(error)} Install that, or choose a model that needs none."
        ) from error
    except Exception as error:
        raise DecafError(f"The model in {folder} cannot be loaded: {_first_line(error)} Download it again.") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines and len(lines[0].split()) < 3 else lines[0] if lines else type(error).__name__


def _check_loaded(folder: Path, info: dict) -> None:
    """Transformers would go on with random numbers in the place of weights that are not there or do not fit."""
    missing = sorted(info["missing_keys"])
    # transformers 5 lists names with both shapes, 4 names alone
    shaped = sorted(one if isinstance(one, str) else one[0] for one in info["mismatched_keys"])
    if missing:
        raise DecafError(
            f"The model in {folder} lacks {len(missing)} weights that its config.json asks for, first of all {missing[0]}. "
            "Download it again."
        )
    if shaped:
        raise DecafError(
            f"{len(shaped)} weights of the model in {folder} have another shape than its config.json asks for, first of all {shaped[0]}. "
            "Its files are not of one model; download it again."
        )


def _check_processor(mllm: MLLM, folder: Path) -> None:
    """A processor without a chat template, or with the tokenizer of another model, loads without a complaint."""
    if not mllm.processor.chat_template:
        raise DecafError(
            f"The model folder {folder} is incomplete: chat_template.jinja or .json is missing. Finish or repeat the download."
        )
    for kind in ("video", "image"):
        number = mllm.family.token_id(mllm, kind)
        if mllm.processor.tokenizer.convert_ids_to_tokens(number) is None:
            raise DecafError(
                f"The tokenizer in {folder} has no token {number}, which config.json names for a {kind}. Its files are not of one model; "
                "download it again."
            )


def _family_of(folder: Path) -> Family:
    if not folder.is_dir():
        raise DecafError(f"There is no model folder {folder}. Put the model's files there, or choose another folder.")
    if not (folder / "config.json").is_file():
        raise DecafError(f"{folder} holds no config.json, so it is not a model folder. Choose the folder that holds config.json.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = config["model_type"]
        text = config.get("text_config", config)
        layer_types = text.get("layer_types") or ()
        family = registry().get(model_type)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DecafError(f"{folder / 'config.json'} is damaged or names no model_type. Download the model again.") from error
    if family is None:
        supported = ", ".join(sorted({f"{one.name} ({', '.join(one.model_types)})" for one in registry().values()}))
        kind = "" if "vision_config" in config else " It is a text-only model: it cannot see pictures."
        raise DecafError(f'The model in {folder} has the type "{model_type}", which is not supported.{kind} Supported are {supported}.')
    if "sliding_attention" in layer_types:
        raise DecafError(
            f"The model in {folder} uses sliding-window attention in some layers; its attention rollout is not supported. "
            "Choose a model with full attention in every layer."
        )
    missing = missing_files(folder)
    if missing:
        listed = ", ".join(missing[:4]) + (" and more" if len(missing) > 4 else "")
        raise DecafError(f"The model folder {folder} is incomplete: {listed} is missing. Finish or repeat the download.")
    return family


def _check_weights(folder: Path) -> None:
    """Opening a safetensors file reads its header and compares its length: a half-copied file is told by name, before memory is taken."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise DecafError(f"{file} is damaged or only half downloaded ({error}). Download it again.") from error
