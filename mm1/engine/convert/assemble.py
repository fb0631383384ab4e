"""Assemble a checkpoint from published weights: CLIP's encoder, Honeybee's connector and a Llama-type decoder.

Nothing is downloaded. Files are memory-mapped and copied tensor by tensor, which takes the memory of one model in fp32.
Sources: Hewitt 2021 (Initializing New Word Embeddings for Pretrained Language Models) for the rows of new tokens;
Komatsuzaki et al. 2023 (Sparse Upcycling, arXiv 2212.05055), which MM1's section 4 uses to initialize experts.
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
from mm1.engine.models.aim import AIM
from mm1.engine.models.mm1 import MM1
from mm1.engine.models.mm1_config import MODELS, MM1Config
from mm1.engine.run_config import to_dict
from mm1.engine.train import checkpoint
from mm1.errors import UserError

State = dict[str, Tensor]
Parts = tuple[MM1Config, State, str]  # config, weights, and the text of tokenizer.json


def assemble(
    out: Path, *, vision: Path | str | None = None, decoder: Path | str | None = None, source: Path | None = None,
    connector: Path | None = None, tokenizer: Path | None = None, image_tokens: int | None = None,
    image_size: int | None = None, context: int | None = None, experts: int = 0, moe_every: int = 2,
    experts_per_token: int = 2, seed: int = 0,
) -> Path:  # fmt: skip
    """Write a checkpoint to the folder `out`, and return `out`.

    Its weights come from `vision` and `decoder`, or from `source`, a checkpoint of mm1.
    vision, decoder: a folder of Hugging Face transformers (config.json, and safetensors in one file or in shards), a
    .safetensors file next to its config.json, or a named size of mm1, which means random weights; vision may also be a
    checkpoint of AIM, or the folder of its run. connector: Honeybee's
    .safetensors; None: random weights. tokenizer: a tokenizer.json; None: the decoder's. image_tokens: tokens of an
    image; None: 144. image_size: side of an image in pixels; None: the encoder's. context: limit of a document's
    tokens, which a sliding window must cover. experts: copies of the dense MLP in every moe_every-th layer; 0: none.
    experts_per_token: experts that each token uses. seed: seed of random weights.
    Raises UserError for input that is missing, damaged or not supported, and if `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already, expected a new folder")
    parts = (vision, decoder, connector, tokenizer, image_tokens, context)
    if source is not None:
        if any(part is not None for part in parts):
            raise UserError("a checkpoint has its own vision, decoder, connector and tokenizer: omit these arguments")
        c, state, text = _checkpoint(source)
    elif vision is None or decoder is None:
        raise UserError("expected either a checkpoint, or both vision and decoder")
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
    """Read a checkpoint of mm1. Raises UserError."""
    if not source.is_dir():
        raise UserError(f"no checkpoint at {source}")
    model = checkpoint.load(source, device="cpu", dtype=torch.float32)
    if not isinstance(model, MM1):
        raise UserError(f"{source} is a model of kind {model.config.kind}, expected mm1")
    assert model.tokenizer is not None
    return model.config, dict(model.state_dict()), Path(model.tokenizer.path).read_text()


def _published(
    vision: Path | str, decoder: Path | str, connector: Path | None, tokenizer: Path | None, image_tokens: int | None,
    context: int | None, seed: int,
) -> Parts:  # fmt: skip
    """Read published weights. Raises UserError."""
    own = _own_aim(Path(vision))
    v, v_folder = (own, None) if own else _part("vision", vision)
    d, d_folder = _part("decoder", decoder)
    tokenizer = tokenizer or (d_folder and d_folder / "tokenizer.json")
    if tokenizer is None:
        raise UserError(f"the size {decoder} has no tokenizer: set --tokenizer")
    text, old_tokens, tokens = with_special_tokens(tokenizer)
    if d_folder is None:
        d = replace(d, vocabulary=vocabulary_size(max(d.vocabulary, tokens)))
    honeybee = None if connector is None else read_tensors(connector)
    if honeybee and any(name.startswith("abstractor.") for name in honeybee):  # a file with all of Honeybee's weights
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
            state[name] = _extended(state[name], old_tokens, tokens, c.decoder.vocabulary)
    return c, state, text


def _extended(old: Tensor, old_tokens: int, tokens: int, rows: int) -> Tensor:
    """Return an embedding [V, D] extended to [rows, D]. New tokens get the mean of the rows of the old tokens.

    old_tokens, tokens: size of the tokenizer before and after; rows of `old` beyond `tokens`, which no token uses, do
    not change. The mean bounds the probability that new tokens take from old ones (Hewitt 2021); random rows can take
    nearly all of it.
    """
    mean = old[:old_tokens].mean(0)
    new = torch.cat([old, mean.expand(rows - len(old), -1)])
    new[old_tokens:tokens] = mean
    return new


def upcycle(model: MM1, experts: int, every: int = 2, *, experts_per_token: int = 2, seed: int = 0) -> MM1:
    """Return a copy of a dense model with experts in every `every`-th layer; 2: the second, the fourth, and so on.

    Each expert is a copy of the layer's MLP, and the weights of a token's experts sum to one, so the mixture computes
    the same as the dense model, whatever its random routers choose.
    experts, experts_per_token: number of experts, and how many of them each token uses; seed: seed of the routers.
    Raises UserError for a decoder that has experts already, and for numbers that do not fit it.
    """
    dense, state = model.config.decoder, dict(model.state_dict())
    sparse = replace(dense, experts=experts, moe_every=every, experts_per_token=experts_per_token)
    _upcycle(state, dense, sparse, seed)
    table = model.decoder.embedding.weight
    upcycled = MM1(replace(model.config, decoder=sparse)).to(table.device, table.dtype)
    upcycled.load_state_dict(state)
    upcycled.init_buffers(table.device)
    upcycled.tokenizer, upcycled.conversations = model.tokenizer, model.conversations
    return upcycled.train(model.training)


def _upcycle(state: State, dense: Decoder, sparse: Decoder, seed: int) -> None:
    """Replace dense MLPs in `state` by experts that are views of them, with random routers as in MM1.init_weights."""
    if dense.experts:
        raise UserError(f"the decoder has {dense.experts} experts already, expected a dense one")
    generator = torch.Generator().manual_seed(seed)
    for layer in range(dense.layers):
        if not is_moe(sparse, layer):
            continue
        mlp = f"decoder.blocks.{layer}.mlp."
        gate, up, down = (state.pop(f"{mlp}{name}.weight") for name in ("gate", "up", "down"))
        router = torch.empty(sparse.experts, sparse.width)
        state[f"{mlp}router.weight"] = router.normal_(0.0, sparse.width**-0.5, generator=generator)
        state[f"{mlp}gate_up"] = torch.cat([gate, up]).expand(sparse.experts, -1, -1)
        state[f"{mlp}down"] = down.expand(sparse.experts, -1, -1)


def _own_aim(source: Path) -> AIM | None:
    """Return the AIM of a checkpoint of mm1, None if the folder is not a checkpoint. Raises UserError."""
    folder = checkpoint.newest_in(source)
    if not (folder / "config.json").is_file() or "model" not in json_object(folder / "config.json"):
        return None
    model = checkpoint.load(folder, device="cpu", dtype=torch.float32)
    if not isinstance(model, AIM):
        raise UserError(f"vision {source} is a model of kind {model.config.kind}, expected aim")
    return model


def _part(part: str, source: Path | str) -> tuple[Any, Path | None]:
    """Return from_hf's argument for a part, and its folder, None for a named size. Raises UserError."""
    path = Path(source)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return (json_object(folder / "config.json"), read_tensors(path)), folder
    if str(source) not in MODELS:
        raise UserError(f"{part} is {str(source)!r}, expected a folder, a file or a named size ({', '.join(MODELS)})")
    return getattr(MODELS[str(source)], part), None


def read_tensors(path: Path) -> State:
    """Return the memory-mapped tensors of a .safetensors file or of a folder. Raises UserError."""
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
            raise UserError(f"{file}: convert it to safetensors; reading another format can run code that it contains")
        if not file.is_file():
            raise UserError(f"no such file of weights: {file}")
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a complete safetensors file: {error}") from None
        if missing := [name for name, shard in shards.items() if path / shard == file and name not in tensors]:
            raise UserError(f"{file}: tensor {missing[0]} is missing, but {index.name} names it")
        state |= {name: tensor for name, tensor in tensors.items() if name not in shards or path / shards[name] == file}
    return state


def _shards(index: Path) -> dict[str, str]:
    """Return the file of each tensor from an index of shards. Raises UserError for a file outside its folder."""
    shards = json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: weight_map is missing")
    for tensor, name in shards.items():
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or ".." in parts or parts[0] == "/" or "\\" in name or "\0" in name:
            raise UserError(f"{index}: {tensor} is in {name!r}, expected a file of its folder")
    return shards
