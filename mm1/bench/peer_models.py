"""Build models of transformers that share their parameters with mm1's."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.engine.convert.weights import CLIP, LLAMA, MIXTURES, views_of
from mm1.engine.data.batch import Batch
from mm1.engine.layers.config import Vision
from mm1.engine.layers.connector import readout
from mm1.engine.layers.decoder import DecoderLM
from mm1.engine.layers.vision import VisionEncoder
from mm1.engine.models.mm1_config import MM1Config
from mm1.engine.models.spec import Losses, Sum
from mm1.integrations.torchvision import declare_operators
from mm1.kernels.patches.reference import runs


def transformers_decoder(decoder: DecoderLM) -> Any:
    """Return transformers' model of the same sizes, whose parameters are views of this decoder's."""
    declare_operators()
    import transformers

    c, mixture = decoder.config, {}
    kind = "Qwen3Moe" if c.experts else "Qwen3" if c.qk_norm else "Llama"
    if c.experts:
        mixture = {"moe_intermediate_size": c.ffn, "num_experts": c.experts, "num_experts_per_tok": c.experts_per_token,
                   "decoder_sparse_step": c.moe_every, "norm_topk_prob": True}  # fmt: skip
    sizes = getattr(transformers, f"{kind}Config")(
        vocab_size=c.vocabulary, hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, head_dim=c.head_width, intermediate_size=c.ffn, rms_norm_eps=c.eps,
        rope_parameters={"rope_theta": c.rope_theta, "rope_type": "default"}, tie_word_embeddings=c.tied, **mixture,
    )  # fmt: skip
    with torch.device(decoder.head_weight.device):
        model = getattr(transformers, f"{kind}ForCausalLM")(sizes).eval()
    # Dense layers of a mixture model. The parameters of its experts have these names without ".weight".
    dense = {"mlp.down.weight": "mlp.down_proj.weight"}
    views = views_of(decoder, LLAMA | MIXTURES[0] | dense, (c.kv_heads, c.head_width))
    views = {name: view.flatten(0, 2) if view.ndim == 4 else view for name, view in views.items()}
    model.load_state_dict(views | {"lm_head.weight": decoder.head_weight}, assign=True)
    model.tie_weights()  # makes tied weights one parameter again
    return model


@dataclass(frozen=True)
class Inputs:
    """Hold a batch in transformers' form: B rows of L tokens, their images, and the targets."""

    tokens: Tensor  # int64 [B, L]
    image_slots: Tensor  # int64 [N·n], index of each image token among the B·L tokens
    images: tuple[Any, ...]  # arguments of the vision model
    decoder: dict[str, Any]  # further arguments of the decoder
    target_count: int


class ClipVision(nn.Module):
    """Encode images of one size with CLIP's encoder.

    mm1's class token becomes the position of CLIP's class token, and CLIP's class embedding a constant zero, so that
    both have one gradient.
    """

    def __init__(self, c: Vision, encoder: VisionEncoder):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.config = c
        self.model = CLIPVisionModel(CLIPVisionConfig(image_size=c.table[0] * c.patch, **_sizes(c)))
        weight = encoder.patch_weight.view(c.width, c.patch, c.patch, 3).permute(0, 3, 1, 2)
        positions = torch.cat([encoder.class_token[None], encoder.positions.flatten(0, 1)])
        _share(self.model, encoder, {
            "patch_weight": weight, "positions": positions, "class_token": torch.zeros_like(encoder.class_token),
        })  # fmt: skip
        self.model.embeddings.class_embedding.requires_grad_(False)

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        """Return normalised pixels, fp32 [N, 3, S, S]."""
        ((count, h, w),) = runs(batch.media.grids.sizes or ())
        pixels = batch.media.values[: count * h * w * self.config.patch**2].view(count, h * self.config.patch, -1, 3)
        return (_normalised(pixels, self.config).permute(0, 3, 1, 2).contiguous(),)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the features [N, Dv, h, w]."""
        features = self.model(pixels).last_hidden_state[:, 1:].transpose(1, 2)
        return [features.unflatten(2, self.config.table)]


class Siglip2Vision(nn.Module):
    """Encode images of any size with SigLIP 2's NaFlex encoder, all patches in one row with a mask between images.

    For 10 images of digits on two cores, forward and backward took 8 ms in this form, 10 ms padded to the largest image
    (the form that its processor makes, in which positions are resampled image by image), and 42 ms size by size.
    """

    def __init__(self, c: Vision, encoder: VisionEncoder):
        super().__init__()
        from transformers import Siglip2VisionConfig, Siglip2VisionModel

        self.config = c
        sizes = Siglip2VisionConfig(num_patches=math.prod(c.table), vision_use_head=False, **_sizes(c))
        self.model = Siglip2VisionModel(sizes)
        self.model.embeddings.patch_embedding.register_parameter("bias", None)
        _share(self.model, encoder, {"positions": encoder.positions.flatten(0, 1)})

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, tuple[tuple[int, int, int], ...]]:
        """Return patches fp32 [1, P, 3p²], the mask of pairs bool [1, 1, P, P], and (count, h, w) of equal sizes."""
        p, first, patches, equal = self.config.patch, 0, [], tuple(runs(batch.media.grids.sizes or ()))
        for count, h, w in equal:
            rows = count * h * w * p * p
            pixels = batch.media.values[first : first + rows].view(count, h, p, w, p, 3)
            patches.append(_normalised(pixels, self.config).transpose(2, 3).reshape(count * h * w, -1))
            first += rows
        lengths = torch.tensor([h * w for n, h, w in equal for _ in range(n)], device=batch.media.values.device)
        image = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        return torch.cat(patches)[None], (image[:, None] == image)[None, None], equal

    def forward(self, patches: Tensor, mask: Tensor, equal: tuple[tuple[int, int, int], ...]) -> list[Tensor]:
        """Return the features of each run of equal sizes, [count, Dv, h, w]."""
        table = self.model.embeddings.position_embedding.weight.T.view(1, -1, *self.config.table)
        positions = [
            F.interpolate(table, (h, w), mode="bilinear", antialias=True).flatten(2)[0].T.repeat(count, 1)
            for count, h, w in equal
        ]
        x = self.model.embeddings.patch_embedding(patches) + torch.cat(positions)
        x = self.model.encoder(x, attention_mask=mask).last_hidden_state[0]
        rows = x.split([count * h * w for count, h, w in equal])
        return [y.view(count, h, w, -1).permute(0, 3, 1, 2) for y, (count, h, w) in zip(rows, equal)]


def vision_of(c: MM1Config, encoder: VisionEncoder) -> ClipVision | Siglip2Vision:
    """Return transformers' encoder that computes what mm1's does, with the same parameters.

    Raises ValueError if transformers has no such encoder.
    """
    v, plain_blocks = c.vision, c.vision.bias and not c.vision.patch_norm
    whole = c.image_mode == "squash" and v.table == (c.image_size // v.patch,) * 2
    if plain_blocks and v.class_token and v.pre_norm and whole:
        return ClipVision(v, encoder)
    square = v.table[0] == v.table[1]
    if plain_blocks and not v.class_token and not v.pre_norm and v.interpolation == "bilinear" and square:
        return Siglip2Vision(v, encoder)
    raise ValueError("transformers has no encoder that computes what this model's does")


class Abstractor(nn.Module):
    """Compute mm1's connector with timm's stages, as Honeybee's code does, with mm1's parameters.

    Without blocks it only pools. timm's stages take images of one size, so the first stage runs once for each size; the
    pool makes the sizes equal. Raises ValueError for another kind of connector.
    """

    def __init__(self, c: MM1Config, connector: nn.Module):
        super().__init__()
        k, width = c.connector, c.vision.width
        whole = c.image_mode == "squash" and k.position_grid == (c.image_size // c.vision.patch,) * 2
        if k.kind == "attention" or (k.kind == "c-abstractor" and k.position_grid and not whole):
            raise ValueError("timm has no stages that compute what this model's connector does")
        self.side, blocks = math.isqrt(k.tokens), k.depth if k.kind == "c-abstractor" else 0
        if k.kind == "c-abstractor" and k.position_grid:
            self.pos_emb = connector.get_parameter("pos_emb")
        if blocks:
            from timm.layers import LayerNorm2d
            from timm.models.regnet import RegStage

            norm = partial(LayerNorm2d, eps=1e-5)
            self.net = nn.ModuleDict({
                place: RegStage(depth=blocks, in_chs=wide, out_chs=k.hidden, stride=1, dilation=1, act_layer=nn.SiLU,
                                norm_layer=norm) for place, wide in (("0", width), ("2", k.hidden))
            })  # fmt: skip
            width = k.hidden
        self.readout = readout(width, c.decoder.width, k.readout_depth)
        self.load_state_dict(dict(connector.named_parameters()), assign=True)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return image tokens [N, n, D] for features [count, Dv, h, w], one tensor for each size."""
        if hasattr(self, "pos_emb"):
            features = [x + self.pos_emb.transpose(1, 2).unflatten(2, x.shape[2:]) for x in features]
        stages = self.net if hasattr(self, "net") else {"0": nn.Identity(), "2": nn.Identity()}
        pooled = [F.adaptive_avg_pool2d(stages["0"](x), self.side) for x in features]
        return self.readout(stages["2"](torch.cat(pooled)).flatten(2).transpose(1, 2))


class TransformersModel(nn.Module):
    """Compute an MM1, with the same loss, by modules of transformers and timm with mm1's parameters.

    Its decoder has less work: it computes no loss that balances experts, which transformers does only on request.
    """

    def __init__(self, model: Any):
        super().__init__()
        c = model.config
        self.decoder = transformers_decoder(model.decoder).train()
        with torch.device(model.decoder.head_weight.device):
            self.vision = vision_of(c, model.vision)
            self.connector = Abstractor(c, model.connector)
        self.image_norm = model.image_norm

    def inputs(self, batch: Batch, packed: bool) -> Inputs:
        """Return a packed batch as one row without padding, or a padded batch as one row for each document.

        Padding is on the right, where causal attention needs no mask. In a packed row the head computes only tokens
        with a target; in several rows transformers cannot choose other tokens for each row.
        """
        tokens, documents = batch.tokens[: batch.used_tokens].long(), len(batch.keys)
        targets = batch.targets[: batch.used_tokens].long()
        decoder: dict[str, Any] = {"use_cache": False, "num_items_in_batch": 1}  # the loss is a sum
        if packed:
            cu_seqlens = batch.cu_seqlens[: documents + 1]
            longest, targets = int(cu_seqlens.diff().max()), targets[batch.target_rows]
            decoder |= {
                "position_ids": batch.positions[: batch.used_tokens].long()[None], "logits_to_keep": batch.target_rows,
                "cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": longest,
                "max_length_k": longest,
            }  # fmt: skip
        rows = 1 if packed else documents
        images = len(batch.media.grids.sizes or ())
        return Inputs(
            tokens=tokens.view(rows, -1),
            image_slots=batch.media.slots[: images * self.connector.side**2],
            images=self.vision.inputs(batch) if images else (),
            decoder=decoder | {"labels": targets.view(rows, -1), "shift_labels": targets.view(rows, -1)},
            target_count=batch.target_count,
        )

    def forward(self, inputs: Inputs) -> Losses:
        """Return the sum of the losses of a batch, in the form of mm1's models."""
        x = self.decoder.get_input_embeddings()(inputs.tokens)
        if inputs.images:
            tokens = self.image_norm(self.connector(self.vision(*inputs.images)).float()).flatten(0, 1)
            x = x.flatten(0, 1).index_copy(0, inputs.image_slots, tokens.to(x.dtype)).view_as(x)
        nll = self.decoder(inputs_embeds=x, **inputs.decoder).loss
        return Losses(nll, {"loss": Sum(nll, "targets")}, nll.new_zeros(0, dtype=torch.int64))

    def attend_by(self, implementation: str) -> None:
        """Choose an attention implementation of transformers. Raises ImportError if its package is missing."""
        if self.decoder.config._attn_implementation != implementation:
            self.decoder.set_attn_implementation(implementation)

    def blocks(self) -> list[nn.Module]:
        """Return the modules to compile, which are both models as a whole.

        On one core a packed step of digits-dense took 113 ms of CPU time, 124 ms compiled by layers, 130 ms eager.
        """
        return [self.vision.model.encoder, self.decoder.model]


def _sizes(c: Vision) -> dict[str, Any]:
    """Return the sizes that have the same names in all vision models of transformers."""
    return {
        "hidden_size": c.width, "intermediate_size": c.ffn, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "patch_size": c.patch, "hidden_act": c.activation, "layer_norm_eps": c.eps,
    }  # fmt: skip


def _share(model: Any, encoder: VisionEncoder, others: dict[str, Tensor]) -> None:
    """Make a model use the encoder's parameters. others: parameters in other shapes than mm1's, by mm1's names."""
    model.post_layernorm = nn.Identity()  # the pooled output is not used
    views = views_of(encoder, CLIP) | {CLIP[name]: value for name, value in others.items()}
    model.load_state_dict(views, assign=True)


def _normalised(pixels: Tensor, c: Vision) -> Tensor:
    """Return uint8 pixels [..., 3] as a processor normalises them, in fp32: (x / 255 - mean) / std."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (c.mean, c.std))
    return (pixels / 255 - mean) / std
