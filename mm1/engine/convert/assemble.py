"""A checkpoint to train from, of published weights on disk: CLIP's encoder, Honeybee's connector, a Llama-type decoder.

Nothing is downloaded. Files are mapped and copied tensor by tensor: memory holds about one model, in fp32.
Sources: Hewitt 2021 (Initializing New Word Embeddings for Pretrained Language Models) for the rows of new tokens;
Komatsuzaki et al. 2023 (Sparse Upcycling, arXiv 2212.05055), by which MM1's section 3.4 starts its experts.
"""

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mm1.engine.convert.preprocessing import normalization
from mm1.engine.convert.weights import from_hf
from mm1.engine.data.tokenizer import json_object, vocabulary_size, with_special_tokens
from mm1.engine.layers.config import Decoder, is_moe
from mm1.engine.models.mm1_config import MODELS, Model, named
from mm1.engine.run_config import to_dict
from mm1.engine.train import checkpoint
from mm1.errors import UserError

State = dict[str, Tensor]
Parts = tuple[Model, State, str]  # and the text of tokenizer.json


def assemble(
    out: Path, *, vision: Path | str | None = None, decoder: Path | str | None = None, source: Path | None = None,
    connector: Path | None = None, tokenizer: Path | None = None, image_tokens: int | None = None,
    image_size: int | None = None, context: int | None = None, experts: int = 0, moe_every: int = 2,
    experts_per_token: int = 2, seed: int = 0,
) -> Path:  # fmt: skip
    """Write a checkpoint of a vision and a decoder, or of a checkpoint of ours (`source`), to `out`; returns that.

    vision, decoder: transformers' folder (config.json, and safetensors whole or in shards), a .safetensors file with
    config.json beside it, or a named size of ours: random weights. connector: Honeybee's .safetensors; None: random.
    tokenizer: a tokenizer.json; None: the decoder's. image_tokens: of the connector; None: 144. image_size: pixels a
    side; None: as the encoder was trained. context: longest document, which a sliding window has to hold. experts:
    copies of the dense MLP in every moe_every-th layer; 0: none. seed: of whatever is random.
    Raises UserError for whatever is missing, damaged or not supported, and if `out` is there already.
    """
    if out.exists():
        raise UserError(f"{out} exists already: give another folder")
    parts = (vision, decoder, connector, tokenizer, image_tokens, context)
    if source is not None:
        if any(part is not None for part in parts):
            raise UserError("a checkpoint has its own vision, decoder, connector and tokenizer: give none beside it")
        c, state, text = _checkpoint(source)
    elif vision is None or decoder is None:
        raise UserError("neither a checkpoint nor both vision and decoder are given")
    else:
        c, state, text = _published(vision, decoder, connector, tokenizer, image_tokens, context, seed)
    if image_size is not None:
        c = replace(c, image_size=image_size, image_patches=(image_size // c.vision.patch) ** 2)
    if experts:
        sparse = replace(c.decoder, experts=experts, moe_every=moe_every, experts_per_token=experts_per_token)
        _upcycle(state, c.decoder, sparse, seed)
        c = replace(c, decoder=sparse)
    texts = {"config.json": json.dumps({"model": to_dict(c)}, indent=1), "tokenizer.json": text}
    checkpoint.write(out, {"model.safetensors": state}, texts)
    return out


def _checkpoint(source: Path) -> Parts:
    if not source.is_dir():
        raise UserError(f"no checkpoint at {source}")
    model = checkpoint.load(source, device="cpu", dtype=torch.float32)
    assert model.tokenizer is not None
    return model.config, dict(model.state_dict()), Path(model.tokenizer.path).read_text()


def _published(
    vision: Path | str, decoder: Path | str, connector: Path | None, tokenizer: Path | None, image_tokens: int | None,
    context: int | None, seed: int,
) -> Parts:  # fmt: skip
    v, v_folder = _part("vision", vision)
    d, d_folder = _part("decoder", decoder)
    tokenizer = tokenizer or (d_folder and d_folder / "tokenizer.json")
    if tokenizer is None:
        raise UserError(f"the size {decoder} has no tokenizer: give one")
    text, known, tokens = with_special_tokens(tokenizer)
    if d_folder is None:
        d = replace(d, vocabulary=vocabulary_size(max(d.vocabulary, tokens)))
    honeybee = None if connector is None else _tensors(connector)
    if honeybee and any(name.startswith("abstractor.") for name in honeybee):  # may be a file of all of Honeybee
        honeybee = {name: tensor for name, tensor in honeybee.items() if name.startswith("abstractor.")}
    image_tokens = 144 if image_tokens is None else image_tokens
    model = from_hf(vision=v, decoder=d, connector=honeybee, image_tokens=image_tokens, context=context, seed=seed)
    c, state = model.config, dict(model.state_dict())
    if v_folder:
        mean, std = normalization(v_folder, c.vision)
        c = replace(c, vision=replace(c.vision, mean=mean, std=std))
    if d_folder:
        c = replace(c, decoder=replace(c.decoder, vocabulary=vocabulary_size(max(c.decoder.vocabulary, tokens))))
        for name in {"decoder.embedding.weight", "decoder.head.weight"} & set(state):
            state[name] = _grown(state[name], known, tokens, c.decoder.vocabulary)
    return c, state, text


def _grown(old: Tensor, known: int, tokens: int, rows: int) -> Tensor:
    """old [V, D] -> [rows, D]: the mean of the `known` first ones for all up to `tokens`, and for all that are new.

    Rows past `tokens` that `old` has, of no token, stay. The mean bounds what new tokens take from the old ones'
    probabilities (Hewitt 2021); random rows may take nearly all.
    """
    mean = old[:known].mean(0)
    new = torch.cat([old, mean.expand(rows - len(old), -1)])
    new[known:tokens] = mean
    return new


def _upcycle(state: State, dense: Decoder, sparse: Decoder, seed: int) -> None:
    """Put copies of the dense MLP for experts into `state`, and routers, random as MM1.initialize makes them.

    The weights of a token's choices sum to one: the mixture computes what the MLP did, whatever its router says.
    """
    layers = [layer for layer in range(dense.layers) if is_moe(sparse, layer)]
    if dense.experts:
        raise UserError(f"the decoder has {dense.experts} experts already: only a dense one can be given experts")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        mlp = f"decoder.blocks.{layer}.mlp."
        gate, up, down = (state.pop(f"{mlp}{name}.weight") for name in ("gate", "up", "down"))
        router = torch.empty(sparse.experts, sparse.width)
        state[f"{mlp}router.weight"] = router.normal_(0.0, sparse.width**-0.5, generator=generator)
        state[f"{mlp}gate_up"] = torch.cat([gate, up]).expand(sparse.experts, -1, -1)  # one, until it is written
        state[f"{mlp}down"] = down.expand(sparse.experts, -1, -1)


def _part(part: str, given: Path | str) -> tuple[Any, Path | None]:
    """What from_hf takes for it, and its folder: None for a named size."""
    path = Path(given)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return (json_object(folder / "config.json"), _tensors(path)), folder
    if str(given) not in MODELS:
        raise UserError(f"{part}: {given} is no folder, no file and no named size ({', '.join(MODELS)})")
    return getattr(named(str(given)), part), None


def _tensors(path: Path) -> State:
    """Tensors of a .safetensors file or a folder's, mapped: read when they are copied."""
    files, index = [path / "model.safetensors"], path / "model.safetensors.index.json"
    shards: dict[str, str] = {}
    if not path.is_dir():
        files = [path]
    elif not files[0].is_file() and index.is_file():
        shards = _shards(index)
        files = [path / name for name in sorted(set(shards.values()))]
    elif not files[0].is_file() and (others := sorted(path.glob("*.bin"))):
        files = others
    state: State = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise UserError(
                f"{file}: convert it to safetensors; other files of weights can run code when they are read"
            )
        if not file.is_file():
            raise UserError(f"no such file of weights: {file}")
        try:
            found = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a whole safetensors file: {error}") from None
        if lost := [name for name, shard in shards.items() if path / shard == file and name not in found]:
            raise UserError(f"{file}: tensor {lost[0]} is missing, expected there by {index.name}")
        state |= {name: tensor for name, tensor in found.items() if name not in shards or path / shards[name] == file}
    return state


def _shards(index: Path) -> dict[str, str]:
    """Tensor name -> its file in the folder of an index. Raises UserError for one that lies elsewhere."""
    shards = json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: weight_map is missing")
    for tensor, name in shards.items():
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or ".." in parts or parts[0] == "/" or "\\" in name or "\0" in name:
            raise UserError(f"{index}: {tensor} is in {name!r}, expected a file of its folder")
    return shards
