"""The command `mm1 convert`."""

from pathlib import Path
from typing import Annotated

import tyro


def convert(
    out: Path,
    /,
    vision: str | None = None,
    decoder: str | None = None,
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    connector: Path | None = None,
    tokenizer: Path | None = None,
    image_tokens: int | None = None,
    image_size: int | None = None,
    context: int | None = None,
    experts: int = 0,
    moe_every: int = 2,
    experts_per_token: int = 2,
    seed: int = 0,
) -> None:
    """Make a checkpoint to start training from (train.init): of published weights, or of a checkpoint with experts.

    Args:
        out: folder to write.
        vision: image encoder: a transformers folder of a CLIP, a .safetensors file with config.json beside it, or a
            named size, whose weights are random (default: that of --from).
        decoder: decoder: likewise, of a Llama, Mistral, Mixtral or Qwen3 (default: that of --from).
        source: checkpoint of this project, instead of --vision and --decoder (default: none).
        connector: connector: Honeybee's .safetensors file (default: random weights).
        tokenizer: a tokenizer.json (default: the decoder's).
        image_tokens: tokens of an image (default: 144).
        image_size: side of an image in pixels (default: the encoder's).
        context: tokens of the longest document, which a sliding window has to hold (default: the decoder's
            max_position_embeddings).
        experts: experts that are copied from the MLP of each MoE layer; 0: none.
        moe_every: make every so-many-th layer a MoE layer.
        experts_per_token: experts that each token is routed to.
        seed: seed of random weights.
    """
    from mm1.engine.convert.assemble import assemble

    print(assemble(
        out, vision=vision, decoder=decoder, source=source, connector=connector, tokenizer=tokenizer,
        image_tokens=image_tokens, image_size=image_size, context=context, experts=experts, moe_every=moe_every,
        experts_per_token=experts_per_token, seed=seed,
    ))  # fmt: skip
