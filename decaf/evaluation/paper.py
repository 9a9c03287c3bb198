"""J&F of the DecAF paper (arXiv 2510.19592), in percent, beside which ours are shown."""

from __future__ import annotations

MODEL = "Qwen2.5-VL-7B"
"""The paper's main model."""

TRACKED = {
    "ref-davis17": {
        MODEL: 75.2, "InternVL3-8B": 62.8, "InternVL3-14B": 63.3, "Qwen2.5-VL-3B": 58.1, "Qwen2-VL-7B": 64.1, "LLaVA-OneVision-7B": 59.4,
    },
    "reasonvos": {
        MODEL: 63.9, "InternVL3-8B": 58.9, "InternVL3-14B": 65.6, "Qwen2.5-VL-3B": 52.9, "Qwen2-VL-7B": 52.5, "LLaVA-OneVision-7B": 52.8,
    },
    "revos": {
        MODEL: 54.2, "InternVL3-8B": 47.4, "InternVL3-14B": 47.0, "Qwen2.5-VL-3B": 39.7, "Qwen2-VL-7B": 45.3, "LLaVA-OneVision-7B": 40.0,
    },
    "mevis": {MODEL: 48.1},
    "ref-youtube-vos": {MODEL: 59.9},
}  # fmt: skip
"""By benchmark and model, with SAM 2."""

GROUPS = {"revos": {"referring": 58.7, "reasoning": 49.7}}
"""By benchmark and group, of the main model with SAM 2."""

COARSE = {"ref-davis17": 25.3, "reasonvos": 20.6, "revos": 20.2}
"""By benchmark, of the main model, without tracking."""


def beside(dataset: str, model: str) -> dict[str, dict[str, float]]:
    """{"model": which, "tracked": {group: J&F}, "coarse": the same}: the paper's figures for the model of this name if it has some, else for its
    main one."""
    tracked = TRACKED.get(dataset, {})
    named = "".join(model.lower().split("-"))
    known = next((one for one in tracked if "".join(one.lower().split("-")) in named), MODEL)
    if known not in tracked:
        return {"model": known, "tracked": {}, "coarse": {}}
    groups = GROUPS.get(dataset, {}) if known == MODEL else {}
    coarse = {"overall": COARSE[dataset]} if known == MODEL and dataset in COARSE else {}
    return {"model": known, "tracked": {"overall": tracked[known], **groups}, "coarse": coarse}
