"""Define the command `mm1 convert`."""

from inspect import signature
from pathlib import Path
from typing import Annotated, Literal

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
    to: Literal["mm1", "aim", "ml-aim"] = "mm1",
) -> None:
    """Make a checkpoint to start training from (train.init): of published weights, or of a checkpoint with experts.

    Or convert an image encoder from and to the files of apple/ml-aim.

    Args:
        out: folder to write.
        vision: the image encoder, a CLIP or AIM, as a folder of Hugging Face transformers, as a .safetensors file next
            to its config.json, as a checkpoint of mm1's AIM, or as a named size of mm1, which means random weights
            (default: that of --from).
        decoder: the decoder, a Llama, Mistral, Mixtral or Qwen3, in the same forms (default: that of --from).
        source: checkpoint of mm1, instead of --vision and --decoder; for --to aim a folder of apple/ml-aim (default:
            none).
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
        to: what is written: an MM1; "aim": an AIM to pre-train further, of the encoder in a folder of apple/ml-aim;
            "ml-aim": such a folder, of a checkpoint of AIM.
    """
    arguments = locals()
    if arguments.pop("to") == "mm1":
        from mm1.engine.convert.assemble import assemble

        print(assemble(**arguments))
        return
    from mm1.engine.convert.aim import convert_aim

    used, defaults = ("out", "source", "seed"), signature(convert).parameters
    others = [name for name in arguments if name not in used and arguments[name] != defaults[name].default]
    print(convert_aim(source, out, to, seed, others))
