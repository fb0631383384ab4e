"""Define the command `mm1 convert`."""

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
        vision: the image encoder, a CLIP or AIM, as a folder of Hugging Face transformers, as a .safetensors file next
            to its config.json, or as a named size of mm1, which means random weights (default: that of --from).
        decoder: the decoder, a Llama, Mistral, Mixtral or Qwen3, in the same forms (default: that of --from).
        source: checkpoint of mm1, instead of --vision and --decoder (default: none).
        connector: the connector, Honeybee's .safetensors file (default: random weights).
        tokenizer: tokenizer.json (default: the decoder's).
        image_tokens: tokens of an image (default: 144).
        image_size: side of an image in pixels (default: the encoder's).
        context: limit of the tokens of a document, at most the decoder's sliding window (default: the decoder's
            max_position_embeddings).
        experts: number of experts of each mixture layer, copies of its MLP; 0: none.
        moe_every: distance between mixture layers; 2: every second layer is one.
        experts_per_token: experts that each token is routed to.
        seed: seed of random weights.
    """
    arguments = locals()
    from mm1.engine.convert.assemble import assemble

    print(assemble(**arguments))
