"""From a folder to a loaded model. Nothing is fetched, no code of the folder is run, and no number of it is believed before it is compared."""

from __future__ import annotations

import importlib
import io
import pkgutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn

from ..devices import is_device_failure, is_out_of_memory, language_dtype, usable_device
from ..errors import DecafError, shown
from ..report import Progress, Report, silent
from . import families
from .base import MLLM, Family
from .engine import TransformersEngine
from .folder import (
    check_picture_files,
    check_sizes,
    check_tokenizer_files,
    missing_files,
    picture_statistics,
    read_config,
    stored_dtype,
    system_prompt,
    weight_shapes,
)
from .streaming import Streaming, check_budget

QUANTISED_AS = ("bitsandbytes",)
"""Quantisation that is loaded, where its package is installed. Other methods may fetch kernels of native code by themselves."""

_LINEAR = "computes most layers with linear attention, which has no attention maps"
_WINDOWS = "attends in sliding windows in most layers and, in some models, to later tokens inside a picture"
_BOTH_WAYS = "lets the tokens of pictures see later ones"
_NO_ROLLOUT = {
    "qwen3_5": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp": _LINEAR,
    "gemma3": _WINDOWS,
    "gemma4": _WINDOWS,
    "paligemma": _BOTH_WAYS,
    "molmo2": _BOTH_WAYS,
    "molmo": "needs Python code from its own folder, which is never run",
    "mllama": "sees pictures through layers of cross-attention: they do not stand in the prompt, whose attention is followed",
    "llama4": "attends within chunks of the prompt in most layers",
}
"""Well-known models that cannot be served as the others are, by the beginning of their `model_type`, and why."""


@cache
def registry() -> dict[str, Family]:
    """Families by the `model_type` of their models' config.json."""
    found = [importlib.import_module(f"{families.__name__}.{entry.name}").FAMILY for entry in pkgutil.iter_modules(families.__path__)]
    return {model_type: family for family in found for model_type in family.model_types}


def all_families() -> list[Family]:
    """Every family once, in the order of their ranks and titles."""
    return sorted(dict.fromkeys(registry().values()), key=lambda family: (family.rank, family.title))


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
    family = _family_of(entries, folder).of_folder(entries, folder)
    told = system_prompt(entries, folder)
    _check_complete(folder)
    check_sizes(entries, folder)
    check_tokenizer_files(folder)
    shapes = weight_shapes(folder)
    dtype = dtype or language_dtype(device, stored_dtype(folder))
    quantised = _quantised_as(entries) is not None
    if quantised and memory_budget is not None:
        raise DecafError(f"A memory budget is for weights as published, and those of {folder} are quantised. Leave the budget out.")
    if dtype not in family.dtypes:
        fine = " or ".join(str(one).removeprefix("torch.") for one in family.dtypes)
        raise DecafError(
            f"{folder.name} cannot be computed in {str(dtype).removeprefix('torch.')}: its activations pass that format's largest number. "
            f"Choose {fine} as its dtype."
        )
    with _explained(folder, report):
        _check_version(entries, folder)
        from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoTokenizer

        # Made from the cleaned entries: the file itself could choose another attention, which would be fetched or not be ours.
        config = CONFIG_MAPPING[entries["model_type"]].from_dict(entries)
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
        vision = family.vision_shape(config)
        _check_total(config, shapes, folder)
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
        _check_loaded(folder, info)
        _check_numbers(folder, model)
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
    return _quantised_as(read_config(Path(folder))) is not None


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


def _family_of(config: dict, folder: Path) -> Family:
    model_type = config["model_type"]
    family = registry().get(model_type)
    if family is None:
        for beginning, why in _NO_ROLLOUT.items():
            if model_type.startswith(beginning):
                raise DecafError(
                    f'The model in {folder} has the type "{model_type:.60}", which {why}; its attention rollout is not supported. Choose a model '
                    "with plain causal attention in every layer, such as Qwen/Qwen3-VL-8B-Instruct."
                )
        supported = ", ".join(f"{one.title} ({', '.join(one.model_types)})" for one in all_families())
        kind = "" if "vision_config" in config else " It is a text-only model: it cannot see pictures."
        raise DecafError(f'The model in {folder} has the type "{model_type:.60}", which is not supported.{kind} Supported are {supported}.')
    text = config.get("text_config", config)
    if not isinstance(text, dict) or not isinstance(config.get("vision_config"), dict):
        raise DecafError(f"{folder / 'config.json'} is damaged (it does not describe a tower of text and one of vision). Download the model again.")
    for tower, entries, known in (("text", text, family.text_types), ("vision", config["vision_config"], family.vision_types)):
        named = entries.get("model_type", known[0]) if entries is not config else known[0]
        if named not in known:
            raise DecafError(
                f"The model in {folder} has a {tower} tower of the type {shown(named, 60)!r}; supported are {', '.join(known)}. Choose another model."
            )
    method = _quantised_as(config)
    if method is not None and method not in QUANTISED_AS:
        raise DecafError(
            f"The model in {folder} cannot be loaded: it is quantised as {shown(method, 60)!r}; supported are weights as published, and "
            f"{', '.join(QUANTISED_AS)}. Choose another version of the model."
        )
    layer_types = text.get("layer_types")
    others = [one for one in layer_types if one != "full_attention"] if isinstance(layer_types, list) else []
    if others:
        what = "sliding-window attention" if "sliding_attention" in others else f"attention of the type {shown(others[0], 60)!r}"
        raise DecafError(
            f"The model in {folder} uses {what} in some layers; its attention rollout is not supported. "
            "Choose a model with full attention in every layer."
        )
    return family


def _quantised_as(config: dict) -> object | None:
    """The method by which the weights are quantised, whatever the configuration says there; None if they are not."""
    text = config.get("text_config")
    quantised = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if quantised is None:
        return None
    return quantised.get("quant_method") or "unnamed" if isinstance(quantised, dict) else quantised


def _check_version(config: dict, folder: Path) -> None:
    """transformers 4 overlooks how version 5 writes the rotary embedding, and would put a default in its place."""
    import transformers

    text = config.get("text_config", config)
    if "rope_parameters" in text and "rope_theta" not in text and int(transformers.__version__.split(".")[0]) < 5:
        raise DecafError(
            f"The model in {folder} was saved for transformers 5, and {transformers.__version__} is installed. Update it: pip install --upgrade "
            "transformers"
        )


def _check_complete(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():  # transformers would load the base model that it names instead
        raise DecafError(
            f"{folder} holds an adapter (adapter_config.json), which belongs to another model. Merge it into that model, or choose that model."
        )
    missing = missing_files(folder)
    if missing:
        listed = ", ".join(missing[:4]) + (" and more" if len(missing) > 4 else "")
        raise DecafError(f"The model folder {folder} is incomplete: {listed} is missing. Finish or repeat the download.")


def _check_total(config: object, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Refuses a configuration that asks for more numbers than the weight files hold, before memory is taken for them.

    The model is built without memory. Packed (quantised) weights hold up to 16 numbers in one.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    asked = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    held = sum(torch.Size(shape).numel() for shape in shapes.values())
    held *= 16 if getattr(config, "quantization_config", None) else 1
    if asked > 1.01 * held + (1 << 24):  # buffers are not in the files
        raise DecafError(
            f"The config.json in {folder} asks for a model of {asked:,} numbers, and its weight files hold {held:,}. Its files are not of one "
            "model; download it again."
        )


def check_tokenizer(mllm: MLLM) -> None:
    """DecafError: the tokenizer is that of another model, or one without words, which load without a complaint."""
    for kind in mllm.family.visual_tokens:
        mllm.visual_token_id(kind)
    if len(mllm.question_ids(None, "cup")) <= len(mllm.question_ids(None, "")):
        raise DecafError("Its tokenizer knows no letters. Download the model again.")


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


def _check_numbers(folder: Path, model: nn.Module) -> None:
    """Refuses weights that are not numbers: every norm and bias whole, and the middle row of every matrix.

    To look at all of them would take longer than to load them, since that only maps the files. A few bad numbers elsewhere are told after the
    first pictures, whose attention queries they spoil.
    """
    for name, weight in model.named_parameters():
        row = weight
        while row.ndim > 1:
            row = row[len(row) // 2]
        if row.is_floating_point() and not row.isfinite().all():
            raise DecafError(
                f"The model in {folder} is damaged: its weight {name} holds numbers that are not finite (NaN or infinite). Download it again."
            )
