"""Convert the encoder of an AIM from and to the files of apple/ml-aim, version 1: config.json and model.safetensors.

Published files hold no pixel head, and the head of an attentive probe, which AIM does not have.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm1.engine.convert.assemble import read_tensors
from mm1.engine.convert.preprocessing import normalization
from mm1.engine.convert.weights import aim_views, aim_vision, load_aim, part_of
from mm1.engine.data.tokenizer import json_object
from mm1.engine.layers.config import PixelHead, Vision
from mm1.engine.models.aim import AIM
from mm1.engine.models.aim_config import AIMConfig
from mm1.engine.run_config import to_dict
from mm1.engine.train import checkpoint
from mm1.errors import UserError


@torch.no_grad()
def from_ml_aim(
    config: Mapping[str, Any], state: Mapping[str, Tensor], seed: int = 0, head: PixelHead | None = None
) -> AIM:
    """Return an AIM in fp32 with a published encoder and a pixel head of random weights from `seed`.

    head: settings of the pixel head; None: AIM's. Raises UserError for a missing, unknown or unsupported field or
    tensor; for a file of version 2 the error names one that only version 2 has.
    """
    c, _ = part_of("vision", (config, state), Vision, aim_vision)
    whole = AIMConfig(replace(c, final_norm=True), head or PixelHead(), image_size=config["img_size"])
    model = AIM(whole).init_weights(seed)
    load_aim(model.vision, state)
    return model


def to_ml_aim(model: AIM) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the state dict of an AIM's encoder as apple/ml-aim has them.

    The image's side is that of a square image of as many patches if the model's images are of any size. Raises
    UserError for an encoder that differs from AIM's in a setting that the layout does not hold.
    """
    c, v = model.config, model.config.vision
    side = c.image_size if c.image_mode == "squash" else int(c.image_patches**0.5) * v.patch
    config = {
        "img_size": side, "patch_size": v.patch, "embed_dim": v.width, "num_blocks": v.layers, "num_heads": v.heads,
        "mlp_ratio": v.ffn / v.width, "use_bias": False,
    }  # fmt: skip
    expected = replace(aim_vision(config), final_norm=True, table=v.table, interpolation=v.interpolation)
    ours, theirs = to_dict(v), to_dict(expected)
    for name in ours:
        if ours[name] != theirs[name]:
            raise UserError(f"model.vision.{name} is {ours[name]}, but in files of apple/ml-aim it is {theirs[name]}")
    return config, {name: view.detach() for name, view in aim_views(model.vision).items()}


def read_ml_aim(source: Path, out: Path, seed: int = 0) -> None:
    """Write a checkpoint of AIM with the encoder in a folder of apple/ml-aim. Raises UserError."""
    model = from_ml_aim(json_object(source / "config.json"), read_tensors(source), seed)
    mean, std = normalization(source, model.config.vision)
    c = replace(model.config, vision=replace(model.config.vision, mean=mean, std=std))
    texts = {"config.json": json.dumps({"model": to_dict(c)}, indent=1)}
    checkpoint.write(out, {"model.safetensors": dict(model.state_dict())}, texts)


def write_ml_aim(source: Path, out: Path) -> None:
    """Write the encoder of a checkpoint of AIM, or of its run, as a folder of apple/ml-aim. Raises UserError."""
    model = checkpoint.load(source, device="cpu", dtype=torch.float32)
    if not isinstance(model, AIM):
        raise UserError(f"{source} is a model of kind {model.config.kind}, expected aim")
    config, state = to_ml_aim(model)
    checkpoint.write(out, {"model.safetensors": state}, {"config.json": json.dumps(config, indent=1)})


def convert_aim(source: Path | None, out: Path, to: str, seed: int, others: list[str]) -> Path:
    """Write `source` to the new folder `out` as a checkpoint ("aim") or a folder of apple/ml-aim ("ml-aim").

    others: names of options that belong to other conversions. Raises UserError if there are some, and for bad input.
    """
    if source is None or others:
        raise UserError(f"--to {to} takes --from{', not --' + others[0].replace('_', '-') if others else ''}")
    if out.exists():
        raise UserError(f"{out} exists already, expected a new folder")
    if to == "aim":
        read_ml_aim(source, out, seed)
    else:
        write_ml_aim(source, out)
    return out
