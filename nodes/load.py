"""The models: a multimodal LLM that says where it looks, and SAM 2."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..decaf.demo import BUNDLED, MLLM_FOLDER, SAM2_FILE
from ..decaf.errors import DecafError
from ..decaf.mllm import all_families
from ..decaf.mllm.download import download_mllm
from ..decaf.mllm.folder import missing_files
from ..decaf.mllm.load import is_quantised, load_mllm
from ..decaf.sam2 import PUBLISHED, download_checkpoint
from ..decaf.segmenters import load_segmenter
from . import host
from .core_mllm import ManagedClip
from .inputs import checked
from .interop import brief
from .segmenter_files import segmenter_files
from .sockets import CATEGORY, MLLM, SAM2
from .text_encoders import load_text_encoder, text_encoder_problem, text_encoders

CHOOSE = "choose a model"
DOWNLOAD = "download: "
FP8 = "fp8"
REPOSITORIES = tuple(repository for family in all_families() for repository in family.repositories)
TITLES = [family.title for family in all_families()]
SUGGESTED = "Qwen/Qwen2.5-VL-7B-Instruct"

host.register_folder("LLM")


def _local_mllms() -> dict[str, Path]:
    """Folders with a config.json directly in models/LLM or one folder below, as packs that sort them by author do."""
    found = {}
    for root in host.folders("LLM"):
        for config in sorted([*root.glob("*/config.json"), *root.glob("*/*/config.json")]):
            found.setdefault(config.parent.relative_to(root).as_posix(), config.parent)
    return found


def _mllm_choices() -> list[str]:
    # `CHOOSE` is always there: a workflow saved with it is valid on every machine, and nothing is downloaded that nobody picked.
    return [*_local_mllms(), *text_encoders(), *(DOWNLOAD + repository for repository in REPOSITORIES), BUNDLED, CHOOSE]


def _encoders_told() -> str:
    """What the text encoders that can be chosen are."""
    return "".join(f" {name}: {file.told}." for name, file in text_encoders().items() if file.usable)


def _first_usable() -> str:
    return next(iter([*_local_mllms(), *(name for name, file in text_encoders().items() if file.usable)]), CHOOSE)


def _mllm_problem(model: object) -> str | None:
    """Why the combo's value cannot be loaded, and what to do. Whatever JSON holds may be its value."""
    file_problem = text_encoder_problem(model) if isinstance(model, str) and model not in _local_mllms() else None
    if file_problem or (model in _mllm_choices() and model != CHOOSE):
        return file_problem
    return (
        ("No multimodal LLM is chosen." if model == CHOOSE else f"There is no model {brief(model)} in models/LLM or models/text_encoders.")
        + f" Put the files of a model such as {SUGGESTED} into a folder of its own in {host.folders('LLM')[0]} and press R, "
        f"or choose a '{DOWNLOAD}...' entry in the node Load Multimodal LLM."
    )


def _sam2_choices() -> list[str]:
    return [*segmenter_files(), *(DOWNLOAD + repository for repository in PUBLISHED), BUNDLED, CHOOSE]


def _sam2_problem(model: object) -> str | None:
    if model in _sam2_choices() and model != CHOOSE:
        return None
    return (
        ("No SAM 2 checkpoint is chosen." if model == CHOOSE else f"There is no checkpoint {brief(model)} in models/sam2.")
        + " Put a SAM 2 or 2.1 checkpoint (.safetensors or .pt, for example sam2.1_hiera_large.pt of facebook/sam2.1-hiera-large) into "
        f"{host.folders('sam2')[0]} and press R, then choose it in the node Load SAM 2, or choose a '{DOWNLOAD}...' entry there."
    )


class LoadMLLM(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        choices = _mllm_choices()
        return io.Schema(
            node_id="LoadMLLM",
            display_name="Load Multimodal LLM",
            category=CATEGORY,
            description=f"Loads the model whose attention says where the thing that you describe is. Families: {', '.join(TITLES)}.",
            search_aliases=["decaf", *TITLES, "qwen vl", "internvl", "mllm", "vlm", "vision language model", "llm loader"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=choices,
                    default=_first_usable(),
                    tooltip="A model folder in models/LLM, or a file in models/text_encoders that sees pictures and that ComfyUI itself loads, "
                    "quantised or not. A 'download' entry fetches the model once, into models/LLM, when the node runs (several GB; safetensors "
                    "only); afterwards it needs no network. bundled: a tiny one that knows only Make Sample Clip." + _encoders_told(),
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", *host.DTYPES, FP8],
                    default="auto",
                    advanced=True,
                    tooltip="Number format of the weights. auto: bf16 on a GPU, also on older ones that are slow at it, since fp32 takes twice the "
                    "memory; fp32 where bf16 is not to be had, as on a CPU. fp8: nearly half of bf16's memory, computed as in auto; maps differ a "
                    "little; a file in models/text_encoders stays as it is stored. fp16 is refused by models that overflow in it. Attention maps are "
                    "always fp32.",
                ),
            ],
            outputs=[MLLM.Output("mllm", tooltip="The loaded model, under ComfyUI's memory management.")],
        )

    @classmethod
    def validate_inputs(cls, model=None):
        # None: linked, its value is not known yet; or missing, which ComfyUI says.
        return True if model is None else _mllm_problem(model) or True

    @classmethod
    @checked
    def execute(cls, model, dtype) -> io.NodeOutput:
        problem = _mllm_problem(model)
        if problem:
            raise DecafError(problem)
        report = host.progress()
        if model in text_encoders() and model not in _local_mllms():
            if dtype == "fp16":
                raise DecafError(f"{model} cannot be computed in fp16: its activations pass that format's largest number. Choose auto, bf16 or fp32.")
            precision = text_encoders()[model].precision
            if dtype == FP8 != precision:
                raise DecafError(
                    f"{model} cannot be kept in fp8: ComfyUI keeps the weights of a text encoder as they are stored in its file, and these are "
                    f"{precision}. Choose auto, or take a file whose name says fp8."
                )
            return io.NodeOutput(ManagedClip(load_text_encoder(model, report), dtype=host.DTYPES.get(dtype)))
        folder = MLLM_FOLDER if model == BUNDLED else _local_mllms().get(model) or _downloaded(model.removeprefix(DOWNLOAD), report)
        # Quantised weights cannot be moved: they are loaded to where they compute.
        device = host.compute_device() if is_quantised(folder) else host.offload_device()
        mllm = load_mllm(folder, device=device, dtype=host.model_dtype("auto" if dtype == FP8 else dtype), progress=report)
        return io.NodeOutput(host.Managed(mllm, float8=dtype == FP8, progress=report))


def _downloaded(repository: str, report) -> Path:
    """The folder of `repository`, wherever it lies already; what is missing of it is fetched."""
    name = repository.split("/")[1]
    here = [folder for label, folder in _local_mllms().items() if label.split("/")[-1] == name]
    folder = here[0] if here else host.folders("LLM")[0] / name
    return download_mllm(repository, folder, report) if missing_files(folder) else folder


class DecAFLoadSAM2(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DecAFLoadSAM2",
            display_name="Load SAM 2",
            category=CATEGORY,
            description="Loads a SAM 2 or SAM 2.1 checkpoint of any size, or the tracker of SAM 3; which one it is, is read from the weights.",
            search_aliases=["decaf", "sam2", "sam 2.1", "sam3", "segment anything"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=_sam2_choices(),
                    default=next(iter(segmenter_files()), CHOOSE),
                    tooltip="A checkpoint in models/sam2, .safetensors or .pt (only its weights are read; a pickle in it is not run). A "
                    "'download' entry fetches one once, into models/sam2, when the node runs (0.2 to 0.9 GB); afterwards it needs no network. "
                    "bundled: a tiny one for Make Sample Clip. SAM 3's file may also lie in models/sam3, sams or checkpoints; SAM 3.1's does "
                    "not work.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["auto", *host.DTYPES],
                    default="auto",
                    advanced=True,
                    optional=True,
                    tooltip="auto: mixed with bf16 where the GPU is good at it, as SAM 2 was trained, else fp32. The weights stay fp32. "
                    "fp32 is slower and differs along edges.",
                ),
            ],
            outputs=[SAM2.Output("sam2", tooltip="The loaded model, under ComfyUI's memory management.")],
        )

    @classmethod
    def validate_inputs(cls, model=None):
        return True if model is None else _sam2_problem(model) or True

    @classmethod
    @checked
    def execute(cls, model, precision="auto") -> io.NodeOutput:
        problem = _sam2_problem(model)
        if problem:
            raise DecafError(problem)
        file = SAM2_FILE if model == BUNDLED else segmenter_files().get(model) or _checkpoint(model.removeprefix(DOWNLOAD))
        dtype = host.mixed_dtype(precision)
        return io.NodeOutput(host.Managed(load_segmenter(file, device=host.offload_device(), dtype=dtype, progress=host.progress())))


def _checkpoint(repository: str) -> Path:
    """The published checkpoint, wherever it lies already; else it is fetched."""
    here = [file for label, file in segmenter_files().items() if label.split("/")[-1] == PUBLISHED[repository]]
    return here[0] if here else download_checkpoint(repository, host.folders("sam2")[0], host.progress())
