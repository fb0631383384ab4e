"""Define the classes that transformers.accelerate swaps in: vision embeddings computed by mm1's kernels.

Interface: transformers 5.23, models/siglip2, models/qwen2_vl, models/qwen3_vl and vision_utils.py.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.integrations.swap import FLOATS, Swapped, compute_dtype, plain, untouched, weights
from mm1.kernels.patches.embedding import embed_patches
from mm1.kernels.patches.grids import Grids
from mm1.kernels.patches.position_tables import positions


class Siglip2Embeddings(Swapped):
    """Compute projection and bilinear, antialiased positions of all images in one kernel, without waiting for sizes."""

    def forward(self: Any, pixel_values: Tensor, spatial_shapes: Tensor) -> Tensor:
        """Return embeddings [B, N, D] of pixel_values [B, N, K] and spatial_shapes [B, 2], on any device.

        Padded rows, beyond an image's h·w, get the position of its first patch. Raises ValueError for sides that are
        not positive and images of more than N patches if the shapes are on a CPU; on a GPU an assertion fails.
        """
        linear, embedding = self.patch_embedding, self.position_embedding
        if not plain(embedding, nn.Embedding) or embedding.weight.dtype not in FLOATS:
            return super().forward(pixel_values, spatial_shapes)
        B, N, _ = pixel_values.shape
        _expect_shapes(spatial_shapes, N)
        table = embedding.weight.reshape(self.position_embedding_size, self.position_embedding_size, -1)
        h, w = spatial_shapes.to(pixel_values.device, non_blocking=True).unbind(1)
        image = torch.arange(B, device=h.device)
        grids = Grids.of_tensors(image * N, h * w, h, w, B * N)
        # A sum of two dtypes has the wider one; the fused kernel would round it to the narrower.
        if plain(linear, nn.Linear) and compute_dtype(linear.weight) == table.dtype:
            y = embed_patches(pixel_values.flatten(0, 1), grids, *weights(linear, table.dtype), table)
        else:
            y = linear(pixel_values.to(linear.weight.dtype)).flatten(0, 1) + positions(table, grids)
        first = positions(table, Grids.of_tensors(image, torch.ones_like(h), h, w, B)).to(y.dtype)
        padding = torch.arange(N, device=h.device) >= (h * w)[:, None]
        return torch.addcmul(y.view(B, N, -1), padding[..., None].to(y.dtype), first[:, None])


def _expect_shapes(shapes: Tensor, rows: int) -> None:
    """Raise ValueError for shapes that the original refuses too; on a GPU an assertion fails later, without a wait."""
    valid = (shapes > 0).all(1) & (shapes.prod(1) <= rows)
    if shapes.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(valid.all(), "SigLIP 2: spatial_shapes has no patches, or more than pixel_values has rows")
    elif not valid.all():
        first = tuple(shapes[~valid][0].tolist())
        raise ValueError(f"SigLIP 2: spatial_shapes has {first}, expected positive sides and at most {rows} patches")


class Placed(NamedTuple):
    """Hold patches and the positions to add, which a tower passes to its patch embedding instead of patches."""

    patches: Tensor
    grids: Grids
    table: Tensor
    interpolation: str
    align_corners: bool


class PatchEmbed(Swapped):
    """Compute the convolution, whose kernel is one patch, as a single product."""

    def forward(self: Any, hidden_states: Tensor | Placed) -> Tensor:
        """Return embeddings [P, D] of P·K values in any shape."""
        if isinstance(hidden_states, Placed):
            patches, grids, table, interpolation, align_corners = hidden_states
            dtype = compute_dtype(self.proj.weight)
            patches, weight = self.operands(patches)
            bias = None if self.proj.bias is None else self.proj.bias.to(dtype)
            return embed_patches(
                patches, grids, weight.to(dtype), bias, table, interpolation=interpolation, antialias=False,
                align_corners=align_corners,
            )  # fmt: skip
        if not plain(self.proj, nn.Conv3d):
            return super().forward(hidden_states)
        patches, weight = self.operands(hidden_states)
        return F.linear(patches.to(self.proj.weight.dtype), weight, self.proj.bias)

    def operands(self: Any, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return patches [P, K] and weight [D, K]."""
        weight = self.proj.weight.flatten(1)
        return patches.view(-1, weight.shape[1]), weight


class StillPatchEmbed(PatchEmbed):
    """Add the weights of the frames, which saves half of the product or more if all frames of a patch are equal."""

    def operands(self: Any, patches: Tensor) -> tuple[Tensor, Tensor]:
        if patches.requires_grad:  # each frame has its own gradient
            return super().operands(patches)
        frames = patches.view(-1, self.in_channels, self.temporal_patch_size, self.patch_size**2)
        return frames[:, :, 0].flatten(1), self.proj.weight.sum(2).flatten(1)


class Tower(Swapped):
    """Compute patch embedding and positions in one kernel; the original computes everything else."""

    def forward(self: Any, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """Return the original's result for hidden_states, P·K values in any shape, and grid_thw [n, 3]."""
        precomputed = kwargs.get("interp_indices") is not None and kwargs.get("interp_weights") is not None
        if precomputed or not self.fuses():
            return super().forward(hidden_states, grid_thw, **kwargs)
        from transformers.vision_utils import get_vision_cu_seqlens

        # Each frame is an image. Counting frames synchronises with the device, in the original too without cu_seqlens.
        cu_seqlens = get_vision_cu_seqlens(grid_thw)
        if kwargs.get("cu_seqlens") is None:
            kwargs["cu_seqlens"] = cu_seqlens
        t, h, w = grid_thw.unbind(1)
        size = {"output_size": cu_seqlens.shape[0] - 1}
        table = self.pos_embed.weight
        side, merge = self.num_grid_per_side, self.config.spatial_merge_size
        grids = Grids.of_tensors(
            cu_seqlens[:-1], cu_seqlens.diff(), h.repeat_interleave(t, **size), w.repeat_interleave(t, **size),
            hidden_states.numel() // self.patch_embed.proj.weight[0].numel(), merge=merge,
        )  # fmt: skip
        placed = Placed(
            hidden_states, grids, table[: side * side].view(side, side, -1), self.interpolation_mode,
            self.interpolation_align_corners,
        )  # fmt: skip
        # The original adds Σ table[indices] · weights, which is zeros [1, D] without indices.
        kwargs["interp_indices"] = torch.zeros(1, 0, dtype=torch.int64, device=table.device)
        kwargs["interp_weights"] = torch.zeros(1, 0, device=table.device)
        return super().forward(placed, grid_thw, **kwargs)

    def fuses(self: Any) -> bool:
        """Return whether the kernel can compute patch embedding and positions."""
        embed, table = self.patch_embed, self.pos_embed
        simple = isinstance(embed, PatchEmbed) and untouched(embed) and plain(table, nn.Embedding)
        return simple and plain(self.patch_embed.proj, nn.Conv3d) and self.patch_embed.proj.weight.dtype in FLOATS


PATCH_EMBEDS = (
    "qwen2_vl.PatchEmbed", "qwen2_5_vl.Qwen2_5_VisionPatchEmbed", "qwen2_5_omni.Qwen2_5_VisionPatchEmbed",
    "qwen3_vl.Qwen3VLVisionPatchEmbed", "qwen3_vl_moe.Qwen3VLMoeVisionPatchEmbed",
    "qwen3_omni_moe.Qwen3OmniMoeVisionPatchEmbed", "qwen3_5.Qwen3_5VisionPatchEmbed",
    "qwen3_5_moe.Qwen3_5MoeVisionPatchEmbed", "qwen4_exp.Qwen4ExpVisionPatchEmbed",
    "cohere_compass.CohereCompassVisionPatchEmbed", "exaone4_5.Exaone4_5_PatchEmbed", "glm4v.Glm4vVisionPatchEmbed",
    "glm4v_moe.Glm4vMoeVisionPatchEmbed", "glm5_next.Glm5NextVisionPatchEmbed", "glm_ocr.GlmOcrVisionPatchEmbed",
    "minimax_m3_vl.MiniMaxM3VLVisionEmbeddings",
)  # fmt: skip
TOWERS = (
    "qwen3_vl.Qwen3VLVisionModel", "qwen3_vl_moe.Qwen3VLMoeVisionModel", "qwen3_omni_moe.Qwen3OmniMoeVisionEncoder",
    "qwen3_5.Qwen3_5VisionModel", "qwen3_5_moe.Qwen3_5MoeVisionModel", "qwen4_exp.Qwen4ExpVisionModel",
    "cohere_compass.CohereCompassVisionModel",
)  # fmt: skip
SWAPS: dict[str, type[Swapped]] = {  # by module and class of transformers.models
    "siglip2.Siglip2VisionEmbeddings": Siglip2Embeddings,
    **dict.fromkeys(PATCH_EMBEDS, PatchEmbed),
    **dict.fromkeys(TOWERS, Tower),
}


def choose(original: type, module: nn.Module, still_images: bool) -> type[Swapped] | None:
    """Return the replacement of a class of transformers, None if there is none."""
    package, _, path = original.__module__.partition(".models.")
    replacement = SWAPS.get(f"{path.partition('.')[0]}.{original.__name__}") if package == "transformers" else None
    if replacement is PatchEmbed and still_images:
        return StillPatchEmbed
    if replacement is Tower and not hasattr(module, "interpolation_align_corners"):  # an older transformers
        return None
    return replacement
