"""SAM 3's image encoder: transformers' vision transformer, and the part of its neck that tracking uses."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor, nn

from ..errors import DecafError, reason


def transformers_classes() -> SimpleNamespace:
    """DecafError: the installed transformers has no SAM 3."""
    import transformers

    try:
        from transformers.models.sam3.configuration_sam3 import Sam3VisionConfig, Sam3ViTConfig
        from transformers.models.sam3.modeling_sam3 import Sam3VisionNeck, Sam3ViTModel
    except ImportError as error:
        raise DecafError(
            f"SAM 3 needs transformers 5 or later; this is {transformers.__version__} ({reason(error)}). "
            "Update the Python package transformers, or take a checkpoint of SAM 2.1."
        ) from error
    return SimpleNamespace(
        Sam3VisionConfig=Sam3VisionConfig, Sam3ViTConfig=Sam3ViTConfig, Sam3VisionNeck=Sam3VisionNeck, Sam3ViTModel=Sam3ViTModel
    )


class Trunk(nn.Module):
    """`vit`: a `Sam3ViTModel`."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    @property
    def blocks(self) -> nn.ModuleList:
        """Nearly all weights of the model, which nothing reads but the blocks' own forward pass."""
        return self.vit.layers

    def forward(self, image: Tensor) -> Tensor:
        """(1, 3, S, S) -> (1, channels, h, w)."""
        tokens = self.vit(image).last_hidden_state
        side = image.shape[-1] // self.vit.config.patch_size
        return tokens.transpose(1, 2).unflatten(2, (side, side))


class ImageEncoder(nn.Module):
    """`neck`: a `Sam3VisionNeck` of three levels. `position_encoding`: positional encodings of a map, of the package `sam2`."""

    def __init__(self, trunk: Trunk, neck: nn.Module, d_model: int, position_encoding: nn.Module):
        super().__init__()
        self.trunk, self.neck, self.position_encoding = trunk, neck, position_encoding
        self.neck.d_model = d_model  # `SAM2Base` asks for it there

    def forward(self, image: Tensor) -> list[Tensor]:
        """(1, 3, S, S) -> three levels (1, d_model, h, w), the finest first, each half the size of the one before."""
        grid = self.trunk(image)
        return [layer(grid) for layer in self.neck.fpn_layers]


def encoder_bytes(model: nn.Module) -> int:
    """Bytes that the image encoder takes beside its weights: the hidden layer of the MLP before and after its activation, or queries, keys and
    values before and after their rotation, on the way; and in the neck the finest level before and after its convolutions."""
    encoder, tokens = model.image_encoder, model.sam_image_embedding_size**2
    config = encoder.trunk.vit.config
    block = tokens * (3 * config.hidden_size + max(2 * config.intermediate_size, 8 * config.hidden_size))
    levels = tokens * (config.hidden_size + (4 + 3 * 16) * model.hidden_dim)
    return 4 * (max(block, levels) + 3 * model.image_size**2)
