"""The tiny model for training: built from its configuration file, with a good start for its filters, and run on many questions at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as qwen
from build import MEAN, NAMES, PATCH, STD
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration


def build_model(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """A fresh model of the configuration in `folder`."""
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    _start_filters(model.model.visual)
    _start_names(model.get_input_embeddings().weight, Tokenizer.from_file(str(folder / "tokenizer.json")))
    return model.float()


@torch.no_grad()
def _start_filters(visual: nn.Module) -> None:
    """A start for seeing patterns: wave filters of four directions, in pairs a quarter wave apart, whose squares the first block sums.

    The rest of the patch embedding are cosine patterns in order of frequency: brightness, two colour differences, change between the
    frames. All of it is trained further.
    """
    layer = visual.patch_embed.proj
    count, side = layer.weight.shape[0], layer.weight.shape[-1]
    waves, cosines = _waves(side), _cosines(side)
    filters = np.stack([*waves, *cosines[: count - len(waves)]]).astype(np.float32)
    layer.weight.copy_(torch.from_numpy(filters))
    block = visual.blocks[0].mlp
    for place in range(len(waves)):
        for index, sign in ((2 * place, 1), (2 * place + 1, -1)):  # silu(x) x + silu(-x) (-x) = x^2
            for part in (block.gate_proj, block.up_proj):
                part.weight[index] = 0
                part.weight[index, place] = sign
    energy = 0.3 * torch.randn(block.down_proj.weight.shape[0], len(waves) // 2)
    block.down_proj.weight[:, : 2 * len(waves)] = energy.repeat_interleave(4, 1)


def _waves(side: int) -> list[np.ndarray]:
    """(3, 2, side, side) each, pairs one after the other: brightness, and its change from frame to frame."""
    axis = (np.arange(side) + 0.5) / side - 0.5
    x, y = np.meshgrid(axis, axis)
    window = np.exp(-(x**2 + y**2) / (2 * 0.33**2))
    found = []
    for change, cycles in ((1, 0.6), (1, 1.0), (1, 1.5), (1, 2.2), (-1, 0.6), (-1, 1.1)):
        for angle in np.arange(4) * np.pi / 4:
            along = 2 * np.pi * cycles * (x * np.cos(angle) + y * np.sin(angle))
            for wave in (np.cos(along), np.sin(along)):
                wave = window * (wave - (window * wave).sum() / window.sum())
                gain = (1 + 2 * cycles) ** 0.7 / 12 * (1 if change > 0 else 1.5)
                found.append(
                    gain * np.broadcast_to(wave / np.linalg.norm(wave) / 6**0.5, (3, 2, side, side)) * np.array([1, change])[:, None, None]
                )
    return found


def _cosines(side: int) -> list[np.ndarray]:
    places = np.arange(side) + 0.5
    waves = np.stack([np.cos(np.pi * places * k / side) for k in range(side)])
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    opponent = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]], float)
    opponent /= np.linalg.norm(opponent, axis=1, keepdims=True)
    choices = []
    for down in range(side):
        for across in range(side):
            pitch = down + across
            choices += [(pitch, down, across, 0, 0), (pitch + 2.5, down, across, 1, 0), (pitch + 2.5, down, across, 2, 0)]
            choices += [(pitch + 0.8, down, across, 0, 1), (pitch + 3.5, down, across, 1, 1)]
    found = []
    for _, down, across, colour, change in sorted(choices):
        pair = np.array([1, -1 if change else 1]) / 2**0.5
        gain = (1 + down + across) ** 0.7 / 12 * (1.5 if change else 1)  # pictures hold less of the fine patterns
        found.append(gain * opponent[colour][:, None, None, None] * pair[None, :, None, None] * np.outer(waves[down], waves[across]))
    return found


@torch.no_grad()
def _start_names(embedding: Tensor, tokenizer: Tokenizer) -> None:
    """The token "red-star" starts as the sum of " red" and " star"."""
    for name in NAMES:
        parts = [tokenizer.encode(" " + word).ids for word in name.split("-")]
        embedding[tokenizer.token_to_id(name)] = sum(embedding[ids[0]] for ids in parts)


def make_fast() -> None:
    """Vision tower: attention over pictures of one size as a batch, the patch embedding as a matrix product. The same numbers, sooner."""

    def attention(self, hidden_states, cu_seqlens, position_embeddings=None, **_):
        length = int(cu_seqlens[1])
        parts = self.qkv(hidden_states).reshape(len(hidden_states), 3, self.num_heads, -1).permute(1, 0, 2, 3)
        query, key = qwen.apply_rotary_pos_emb_vision(parts[0], parts[1], *position_embeddings)
        query, key, value = (x.to(parts.dtype).unflatten(0, (-1, length)).transpose(1, 2) for x in (query, key, parts[2]))
        out = scaled_dot_product_attention(query, key, value, scale=self.scaling)
        return self.proj(out.transpose(1, 2).reshape(len(hidden_states), -1))

    def embed(self, hidden_states):
        return linear(hidden_states, self.proj.weight.flatten(1))

    qwen.Qwen2_5_VLVisionAttention.forward = attention
    qwen.Qwen2_5_VisionPatchEmbed.forward = embed


def patches(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """(B, T, H, W, 3) uint8 -> (B * slots * rows * cols, 3 * 2 * PATCH^2) float32 as the processor makes them, and (slots, rows, cols)."""
    if frames.shape[1] % 2:
        frames = torch.cat([frames, frames[:, -1:]], 1)
    batch, length, height, width, _ = frames.shape
    slots, rows, cols = length // 2, height // PATCH, width // PATCH
    mean, std = (torch.tensor(value, device=frames.device).repeat_interleave(2 * PATCH * PATCH) for value in (MEAN, STD))
    pixels = frames.view(batch, slots, 2, rows, PATCH, cols, PATCH, 3).permute(0, 1, 3, 5, 7, 2, 4, 6)
    pixels = pixels.reshape(batch * slots * rows * cols, -1).float()  # put in order as bytes, then in place: half of the time of a step
    return pixels.mul_(1 / (255 * std)).sub_(mean / std), (slots, rows, cols)


def see(model, frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Visual tokens (B, slots * rows * cols, width) and their grid."""
    pixels, grid = patches(frames)
    out = model.model.visual(pixels, grid_thw=torch.tensor([grid] * len(frames), device=frames.device))
    return out.pooler_output.view(len(frames), -1, model.config.text_config.hidden_size), grid


class Asker:
    """Puts several questions behind one picture or clip: each sees the picture and itself, at the positions that it would have alone."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.before = self._ids("<|im_start|>user\n<|vision_start|>")
        self.video, self.image = (tokenizer.token_to_id(f"<|{name}_pad|>") for name in ("video", "image"))
        self.after = tokenizer.token_to_id("<|vision_end|>")
        self.turn = self._ids("<|im_end|>\n<|im_start|>assistant\n")
        self.end = tokenizer.token_to_id("<|im_end|>")
        self.known: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self._ids(text)
        return self.known[text]

    def states(self, model, seen: Tensor, grid: tuple[int, int, int], video: bool, asked: list[list[tuple[str, str]]]):
        """Hidden states (n, width) that must give the next tokens (n,), and the place of each answer's first token among them, (B, Q)."""
        batch, visual = seen.shape[:2]
        prefix = len(self.before) + visual + 1
        rows = [[self.ids(question) + self.turn + self.ids(reply) + [self.end] for question, reply in pairs] for pairs in asked]
        tail = [[len(self.ids(reply)) + 1 for _, reply in pairs] for pairs in asked]
        length, many = max(len(row) for one in rows for row in one), len(rows[0])
        ids = torch.full((batch, many, length), self.end)
        wanted = torch.full((batch, many, length), -1)
        for b, one in enumerate(rows):
            for q, row in enumerate(one):
                ids[b, q, : len(row)] = torch.tensor(row)
                keep = tail[b][q]
                wanted[b, q, len(row) - keep - 1 : len(row) - 1] = torch.tensor(row[-keep:])
        embed = model.get_input_embeddings()
        edge = embed(torch.tensor([*self.before, self.after], device=seen.device)).expand(batch, -1, -1)
        whole = torch.cat([edge[:, :-1], seen.to(edge.dtype), edge[:, -1:], embed(ids.to(seen.device)).flatten(1, 2)], 1)
        places = self._positions(grid, video, many, length).to(seen.device)
        mask = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()
        block = torch.full((whole.shape[1],), -1)
        block[prefix:] = torch.arange(many).repeat_interleave(length)
        mask &= (block[None] == -1) | (block[None] == block[:, None])
        mask = mask[None, None].expand(batch, 1, -1, -1).to(seen.device)
        hidden = model.model.language_model(
            inputs_embeds=whole, position_ids=places[:, None].expand(3, batch, -1), attention_mask={"full_attention": mask}, use_cache=False
        ).last_hidden_state[:, prefix:]
        wanted = wanted.flatten(1).to(seen.device)
        chosen = wanted >= 0
        first = torch.zeros_like(wanted)
        first[chosen] = torch.arange(int(chosen.sum()), device=seen.device)
        starts = torch.tensor([[q * length + len(row) - tail[b][q] - 1 for q, row in enumerate(one)] for b, one in enumerate(rows)])
        return hidden[chosen], wanted[chosen], first.gather(1, starts.to(seen.device))

    def _positions(self, grid, video: bool, many: int, length: int) -> Tensor:
        """(3, L): as `decaf` counts them: two units of time a slot, text one past the largest one."""
        start = len(self.before)
        slots, rows, cols = grid
        axes = torch.arange(slots) * (2 if video else 1), torch.arange(rows), torch.arange(cols)
        seen = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + start
        follow = int(seen.max()) + 1
        text = torch.cat([torch.tensor([follow]), (torch.arange(length) + follow + 1).repeat(many)])
        return torch.cat([torch.arange(start).expand(3, -1), seen, text.expand(3, -1)], 1)


def read(model, asker: Asker, asked: list[tuple[str, str]]):
    """Questions without pictures: hidden states and wanted tokens, of each question its answer and then the end."""
    opening = asker.ids("<|im_start|>user\n")
    rows = [opening + asker.ids(question) + asker.turn + asker.ids(reply) for question, reply in asked]
    length = max(map(len, rows))
    ids = torch.tensor([row + [asker.end] * (length - len(row)) for row in rows])
    places = torch.arange(length).expand(3, len(rows), -1)
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(len(rows), 1, -1, -1)
    embed = model.get_input_embeddings()(ids)
    hidden = model.model.language_model(
        inputs_embeds=embed, position_ids=places, attention_mask={"full_attention": mask}, use_cache=False
    ).last_hidden_state
    last = torch.tensor([[len(row) - 2, len(row) - 1] for row in rows])
    return hidden[torch.arange(len(rows))[:, None], last].flatten(0, 1), torch.tensor([id for row in rows for id in (row[-1], asker.end)])


def load(model, folder: Path) -> None:
    """The weights of model.safetensors, as `export` writes it, into a model of the same sizes."""
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tower, _, rest = name.partition(".")
        renamed[{"visual": "model.visual.", "model": "model.language_model."}[tower] + rest] = tensor.float()
    renamed["lm_head.weight"] = renamed["model.language_model.embed_tokens.weight"]
    model.load_state_dict(renamed)


def export(model, folder: Path) -> None:
    """Writes model.safetensors: float16, under the names that the hub's models have."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied to the embedding
            continue
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        renamed[name] = tensor.detach().to(torch.float16).contiguous()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
