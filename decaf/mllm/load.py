"""From a folder to a loaded model. Nothing is fetched, no code of the folder is run, and no number of it is believed before it is compared."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..devices import is_device_failure, is_out_of_memory, language_dtype, usable_device
from ..errors import DecafError, shown
from ..report import Progress, Report, silent
from .base import MLLM
from .checks import check_complete, check_loaded, check_numbers, check_tokenizer, check_total, check_version
from .engine import TransformersEngine
from .folder import (
    check_picture_files,
    check_sizes,
    check_tokenizer_files,
    picture_statistics,
    read_config,
    stored_dtype,
    system_prompt,
    weight_shapes,
)
from .streaming import Streaming, check_budget
from .supported import family_of, quantised_as


def load_mllm(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    progress: Progress | Report = silent,
) -> MLLM:
    """Load a multimodal LLM from a local folder in the hub's format. Nothing is fetched and no code from the folder is run.

    Args:
        folder: holds config.json, *.safetensors and tokenizer files.
        dtype: of the weights; None takes what suits the device, see `decaf.devices.language_dtype`. Maps are float32 in any case.
        memory_budget: bytes of the device that the model and its passes may take. Weights that do not fit stay in host memory and come to the
            device layer by layer. None: all of them lie on the device.

    Raises DecafError for a folder that is missing, incomplete, damaged, text-only, or of a family that is not supported, and for a device
    that is not there.
    """
    folder, device, report = Path(folder), usable_device(device), Report.of(progress)
    step = f"Loading {folder.name}"
    report.progress(0, 1, step)
    check_budget(memory_budget, device)
    entries = read_config(folder)
    family = family_of(entries, folder).of_folder(entries, folder)
    told = system_prompt(entries, folder)
    check_complete(folder)
    check_sizes(entries, folder)
    check_tokenizer_files(folder)
    shapes = weight_shapes(folder)
    dtype = dtype or language_dtype(device, stored_dtype(folder))
    quantised = quantised_as(entries) is not None
    if quantised and memory_budget is not None:
        raise DecafError(f"A memory budget is for weights as published, and those of {folder} are quantised. Leave the budget out.")
    problem = family.dtype_problem(dtype)
    if problem:
        raise DecafError(f"{folder.name} cannot be computed in {str(dtype).removeprefix('torch.')}: {problem}")
    with _explained(folder, report):
        check_version(entries, folder)
        from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoTokenizer

        # Made from the cleaned entries: the file itself could choose another attention, which would be fetched or not be ours.
        config = CONFIG_MAPPING[entries["model_type"]].from_dict(entries)
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
        vision = family.vision_shape(config)
        check_total(config, shapes, folder)
    mean, std = picture_statistics(folder) or (family.mean, family.std)
    cut = {"patch_size": vision.patch, "merge_size": vision.merge, "temporal_patch_size": vision.frames_per_slot}
    check_picture_files(folder, {"side": vision.tile} if vision.tile else cut)
    report.progress(0, 1, step)
    with _explained(folder, report):
        # Weights of another shape are let through here to be named below.
        files = {"use_safetensors": True, "local_files_only": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        run_as = {"config": config, "dtype": dtype, "attn_implementation": "sdpa"}
        if quantised:  # packed numbers cannot be moved later
            run_as["device_map"] = {"": device}
        with _weight_by_weight(report, step), torch.inference_mode(False):
            model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False, **files, **run_as)
        check_loaded(folder, info)
        check_numbers(folder, model)
        model.eval().requires_grad_(False)
        family.prepare(model)
        streaming = Streaming(model, device) if memory_budget is not None else None
        if streaming is None and not quantised:
            model.to(device)
        told = family.system if told is None else told
        mllm = MLLM(TransformersEngine(model, device, dtype), tokenizer, family, folder.name, vision, mean, std, told, memory_budget, streaming)
        check_tokenizer(mllm)
    report.progress(1, 1, step)
    return mllm


def is_quantised(folder: str | Path) -> bool:
    """Whether the weights in this folder are quantised: they have to be loaded to the device that computes. DecafError: no readable config.json."""
    return quantised_as(read_config(Path(folder))) is not None


@contextmanager
def _weight_by_weight(report: Report, step: str) -> Iterator[None]:
    """Reports every weight that transformers loads in this thread, so that loading gigabytes can be watched and cancelled. Before version 5 the
    library has no place for that: then the step is reported when it begins and ends."""
    from transformers.utils import logging as transformers_logging

    if not hasattr(transformers_logging, "set_tqdm_hook"):
        yield
        return
    from tqdm import tqdm

    class Reported(tqdm):
        """Reports instead of drawing."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO(), "mininterval": 0.1})

        def update(self, n=1):
            shown = super().update(n)
            if self.total:
                report.progress(min(int(self.n), int(self.total)), int(self.total), step)
            return shown

    here = threading.get_ident()

    def hook(factory, args, kwargs):
        return Reported(*args, **kwargs) if threading.get_ident() == here else factory(*args, **kwargs)

    before = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


@contextmanager
def _explained(folder: Path, report: Report) -> Iterator[None]:
    """Re-raise any loading error as a DecafError that names the folder. Which errors damaged files raise is beyond any list."""
    try:
        yield
    except DecafError as error:
        if str(folder) in str(error):
            raise
        raise DecafError(f"The model in {folder} cannot be loaded. {error}") from error
    except ImportError as error:
        if report.cancelled_by(error):
            raise
        raise DecafError(_import_failed(folder, error, _root_cause(error))) from error
    except Exception as error:
        if report.cancelled_by(error) or is_out_of_memory(error) or is_device_failure(error):
            raise
        raise DecafError(f"The model in {folder} cannot be loaded: {_first_line(error)} Download it again.") from error


def _root_cause(error: BaseException) -> BaseException:
    """transformers imports late, and raises the last link of a chain, not the first."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    return error


def _import_failed(folder: Path, error: ImportError, root: BaseException) -> str:
    """What to say of a package that is missing or broken."""
    if type(root) is Exception:  # how the tokenizers library tells a damaged file; transformers then looks for another library to read it
        return f"The model in {folder} cannot be loaded: {_first_line(root)} Download it again."
    what = f"{type(root).__name__}: {_first_line(root)}" if root is not error else _first_line(error)
    if (root.name if isinstance(root, ImportError) else None) == "transformers" or "from 'transformers'" in str(error):
        return f"The Python package transformers is missing or too old ({what}). Install it: pip install --upgrade transformers"
    return (
        f"The model in {folder} cannot be loaded, because a Python package cannot be imported here ({what}). Install or repair that package in "
        "the Python that runs this, or choose a model that needs none."
    )


def _first_line(error: BaseException) -> str:
    """Some libraries list all that would have been fine; the kind of error helps where there are few words."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__ + "."
    text = f"{type(error).__name__}: {lines[0]}" if len(lines[0].split()) < 3 else lines[0]
    return shown(text, 240)
