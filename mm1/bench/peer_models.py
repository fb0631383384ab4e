"""Whole models of transformers, of the sizes of ours."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.bench import mix
from mm1.engine import config
from mm1.engine.connector import AveragePool
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


class TransformersModel(nn.Module):
    """CLIP's encoder, adaptive mean, readout, and transformers' decoder of our sizes."""

    def __init__(self, c: config.Model):
        super().__init__()
        v = c.vision
        self.decoder = transformers_decoder(MM1(c).initialize().decoder).train()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.vision = CLIPVisionModel(CLIPVisionConfig(
            hidden_size=v.width, intermediate_size=v.ffn, num_hidden_layers=v.layers, num_attention_heads=v.heads,
            image_size=c.image_size, patch_size=v.patch, hidden_act=v.activation,
        ))  # fmt: skip
        self.pool = AveragePool(v.width, c.decoder.width, tokens=c.connector.tokens,
                                readout_depth=c.connector.readout_depth)  # fmt: skip

    def forward(self, tokens: Tensor, mask: Tensor, labels: Tensor, pixels: Tensor) -> Tensor:
        """int [B, L], what is no padding bool [B, L], labels [B, L], fp32 [N, 3, S, S] -> mean loss."""
        x = self.decoder.get_input_embeddings()(tokens)
        if len(pixels):
            features = self.vision(pixels).last_hidden_state[:, 1:].transpose(1, 2)
            side = math.isqrt(features.shape[2])
            pooled = F.adaptive_avg_pool2d(features.unflatten(2, (side, side)), self.pool.out)
            images = self.pool.readout(pooled.flatten(2).transpose(1, 2))
            x = x.masked_scatter((tokens == mix.IMAGE)[..., None], images.to(x.dtype))
        return self.decoder(inputs_embeds=x, attention_mask=mask, labels=labels, use_cache=False).loss
