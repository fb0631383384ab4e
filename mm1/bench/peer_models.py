"""Whole models of transformers, of the sizes of ours."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mm1.bench import mix
from mm1.engine import config
from mm1.engine.connector import readout
from mm1.engine.convert import LLAMA, MIXTURES, views_of
from mm1.engine.decoder import DecoderLM
from mm1.engine.model import MM1
from mm1.integrations.torchvision import declare_operators


def transformers_decoder(decoder: DecoderLM) -> Any:
    """transformers' model of the same sizes, with our parameters for its own."""
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
    # Beside mixtures, which have parameters of these names without ".weight", there are dense layers.
    dense = {"mlp.down.weight": "mlp.down_proj.weight"}
    views = views_of(decoder, LLAMA | MIXTURES[0] | dense, (c.kv_heads, c.head_width))
    views = {name: view.flatten(0, 2) if view.ndim == 4 else view for name, view in views.items()}
    model.load_state_dict(views | {"lm_head.weight": decoder.head_weight}, assign=True)
    model.tie_weights()  # one parameter again, if they are tied
    return model


class Abstractor(nn.Module):
    """Of images of one size, as Honeybee's code assembles it of timm's stages; without blocks the mean alone."""

    def __init__(self, c: config.Model):
        super().__init__()
        k, width = c.connector, c.vision.width
        side, blocks = math.isqrt(k.tokens), k.depth if k.kind == "c-abstractor" else 0
        stages = [nn.Identity(), nn.Identity()]
        if blocks:
            from timm.layers import LayerNorm2d
            from timm.models.regnet import RegStage

            stages = [RegStage(depth=blocks, in_chs=wide, out_chs=k.hidden, stride=1, dilation=1, act_layer=nn.SiLU,
                               norm_layer=LayerNorm2d) for wide in (width, k.hidden)]  # fmt: skip
            width = k.hidden
        self.net = nn.Sequential(stages[0], nn.AdaptiveAvgPool2d(side), stages[1])
        self.readout = readout(width, c.decoder.width, k.readout_depth)

    def forward(self, features: Tensor) -> Tensor:
        """[N, Dv, h, w] -> [N, n, D]"""
        return self.readout(self.net(features).flatten(2).transpose(1, 2))


class TransformersModel(nn.Module):
    """CLIP's encoder, timm's stages as a connector, and transformers' decoder of our sizes."""

    def __init__(self, c: config.Model):
        super().__init__()
        v = c.vision
        self.decoder = transformers_decoder(MM1(c).initialize().decoder).train()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.vision = CLIPVisionModel(CLIPVisionConfig(
            hidden_size=v.width, intermediate_size=v.ffn, num_hidden_layers=v.layers, num_attention_heads=v.heads,
            image_size=c.image_size, patch_size=v.patch, hidden_act=v.activation,
        ))  # fmt: skip
        self.connector = Abstractor(c)

    def forward(self, tokens: Tensor, mask: Tensor, labels: Tensor, pixels: Tensor) -> Tensor:
        """int [B, L], what is no padding bool [B, L], labels [B, L], fp32 [N, 3, S, S] -> mean loss."""
        x = self.decoder.get_input_embeddings()(tokens)
        if len(pixels):
            features = self.vision(pixels).last_hidden_state[:, 1:].transpose(1, 2)
            side = math.isqrt(features.shape[2])
            images = self.connector(features.unflatten(2, (side, side)))
            x = x.masked_scatter((tokens == mix.IMAGE)[..., None], images.to(x.dtype))
        return self.decoder(inputs_embeds=x, attention_mask=mask, labels=labels, use_cache=False).loss
