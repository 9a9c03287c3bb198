"""ComfyUI's classes are no public interface: where they change, the node says so in a sentence, and gives no wrong maps. Run by inside.py.

Each case changes one thing in ComfyUI's own code, as a newer version might.
"""

from unittest.mock import patch

import torch
from comfy.text_encoders import llama
from comfyui_version import __version__
from core_kit import clip, expect_equal, extract, theirs
from kit import images, module
from small_core import FILES

FEW = {"frames": images(2), "query": "the bright square", "max_key_frames": 2}


def refusal(name, *, tried=False) -> str:
    """What the node says. `tried`: the model was tried out before, so that only the looks of every pass are left."""
    tries = module("nodes.core_mllm")._tried
    tries.clear()
    if tried:
        tries[transformer_of(name)] = clip(name).patcher.patches_uuid
    try:
        extract(clip(name), **FEW)
    except ValueError as error:
        assert type(error).__name__ == "DecafError", repr(error)
        assert __version__ in str(error) and "Update ComfyUI" in str(error), error
        return str(error)
    raise AssertionError(f"{name} ran")


def changed(owner, name, make):
    """Replaces a function of ComfyUI by what `make` makes of it."""
    return patch.object(owner, name, make(getattr(owner, name)))


def attention_called(alter):
    """Its decoder layers' attention is handed an attention function that calls ours in another way: `alter(function, q, k, v, heads, keywords)`."""

    def make(whole):
        def forward(self, *args, optimized_attention=None, **more):
            def other(q, k, v, heads, **keywords):
                return alter(optimized_attention, q, k, v, heads, keywords)

            return whole(self, *args, optimized_attention=other, **more)

        return forward

    return changed(llama.Attention, "forward", make)


def layer_called(alter):
    """The layers' attention gets other keywords: `alter(keywords)`."""

    def make(whole):
        def forward(self, *args, **keywords):
            own = self.self_attn

            class Between(torch.nn.Module):
                def forward(self, **given):
                    return own(**alter(dict(given)))

            with patch.dict(self._modules, {"self_attn": Between()}):
                return whole(self, *args, **keywords)

        return forward

    return changed(llama.TransformerBlock, "forward", make)


def case_core_changed_attention_is_refused_in_every_pass():
    plain = torch.nn.functional.scaled_dot_product_attention

    def by_itself(function, q, k, v, heads, keywords):
        k, v = (one.repeat_interleave(heads // one.shape[1], 1) for one in (k, v))
        return plain(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def window(given):
        mask = given["attention_mask"].clone()
        mask[..., -1, 0] = torch.finfo(mask.dtype).min / 4
        return given | {"attention_mask": mask}

    def ahead(given):
        mask = given["attention_mask"].clone()
        mask[..., 0, 1] = 0
        return given | {"attention_mask": mask}

    def without(given):
        own = given.pop("optimized_attention")
        return given | {"attention": own}

    changes = {
        "does not ask": attention_called(by_itself),
        "rows": attention_called(lambda f, q, k, v, h, more: f(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), h, **more)),
        "flat": attention_called(lambda f, q, k, v, h, more: f(*(one.transpose(1, 2).flatten(2) for one in (q, k, v)), h, mask=more["mask"])),
        "soft cap": attention_called(lambda f, q, k, v, h, more: f(q, k, v, h, softcap=50.0, **more)),
        "scale": attention_called(lambda f, q, k, v, h, more: f(q, k, v, h, scale=0.5, **more)),
        "window": layer_called(window),
        "sees ahead": layer_called(ahead),
        "sliding": layer_called(lambda given: given | {"sliding_window": 1024}),
        "other name": layer_called(without),
    }
    for name in ("qwen2_5_vl", "qwen3_vl_8b"):
        before = extract(clip(name), **FEW)
        for what, change in changes.items():
            with change:
                for tried in (True, False):
                    try:
                        assert "differs by" not in refusal(name, tried=tried), "it took the trial to see it"
                    except AssertionError as error:
                        raise AssertionError(f"{what}: {error}") from error
        expect_equal(extract(clip(name), **FEW), before, most=1e-6)
        assert not any(layer.self_attn._forward_pre_hooks for layer in decoder_of(name).layers), "a hook stayed"


def transformer_of(name):
    return module("nodes.core_mllm").managed(clip(name)).value.model


def decoder_of(name):
    return transformer_of(name).model


def case_core_changed_numbers_are_refused_by_the_trial():
    def sharper(whole):
        return lambda *args, **more: lambda q, k, v, *rest, **given: whole(*args, **more)(3 * q, k, v, *rest, **given)

    def other_turn(whole):
        def turned(dim, position_ids, theta, *args, **more):
            return whole(dim, position_ids, theta / 100, *args, **more)

        return turned

    def one_axis(whole):
        return lambda dim, position_ids, *args, **more: whole(dim, position_ids[:1].expand(3, -1), *args, **more)

    def other_sections(whole):
        def turned(*args, **more):
            return whole(*args, **more | {"interleaved_mrope": not more.get("interleaved_mrope")})

        return turned

    changes = {
        "sharper": lambda: changed(llama, "optimized_attention_for_device", sharper),
        "another turn": lambda: changed(llama, "precompute_freqs_cis", other_turn),
        "one axis": lambda: changed(llama, "precompute_freqs_cis", one_axis),
        "sections": lambda: changed(llama, "precompute_freqs_cis", other_sections),
    }
    for name in FILES:
        for what, change in changes.items():
            with change():
                message = refusal(name)
            assert "differs by" in message, (what, message)
        expect_equal(extract(clip(name), **FEW), extract(theirs(name), **FEW))


def case_core_changed_names_and_shapes_are_refused():
    def renamed(whole):
        def forward(self, x, attention_mask=None, inputs_embeds=None, position_ids=None):
            return whole(self, x, embeds=inputs_embeds, position_ids=position_ids)

        return forward

    def skipping(whole):
        def forward(self, *args, **more):
            with patch.dict(self._modules, {"layers": torch.nn.ModuleList(list(self.layers)[:-1])}):
                return whole(self, *args, **more)

        return forward

    def late(whole):
        """Deepstack a layer later."""

        def forward(self, *args, deepstack_embeds=None, **more):
            if deepstack_embeds is not None:
                deepstack_embeds = [torch.zeros_like(deepstack_embeds[0]), *deepstack_embeds]
            return whole(self, *args, deepstack_embeds=deepstack_embeds, **more)

        return forward

    name = "qwen3_vl_8b"
    loaded = clip(name)
    visual, config = transformer_of(name).visual, decoder_of(name).config
    tokenizers = type(loaded.tokenizer)
    changes = {
        "decoder": changed(llama.Llama2_, "forward", renamed),
        "layers": changed(llama.Llama2_, "forward", skipping),
        "deepstack": changed(llama.Llama2_, "forward", late),
        "tower": changed(type(visual), "forward", lambda whole: lambda self, *given: whole(self, *given)[0][None]),
        "levels": changed(type(visual), "forward", lambda whole: lambda self, *given: (whole(self, *given)[0], [])),
        "sections": patch.object(type(config), "rope_dims", [44, 10, 10]),
        "numbers": patch.object(type(config), "head_dim", property()),
        "tokenizer": patch.object(tokenizers, "clip", property(lambda self: "words", lambda self, value: None), create=True),
        "family": patch.object(module("nodes.core_mllm"), "registry", dict),
    }
    for what, change in changes.items():
        with change:
            try:
                refusal(name)
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}") from error
    expect_equal(extract(loaded, **FEW), extract(theirs(name), **FEW))
