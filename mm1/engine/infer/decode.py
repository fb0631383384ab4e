"""Run a decoding step on a CPU in one call of decode.cpp, which is compiled for this machine at its first use."""

import ctypes
import os
import shlex
import shutil
import warnings
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mm1.engine.infer.cache import PAGE, Cache
from mm1.engine.infer.compiled import CannotCompile, compiled
from mm1.kernels.tuning import cache_folder

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
PRODUCTS = 300_000_000  # multiply-adds that take as long as the calls of torch (digits: 220 rows of 1.4 M)
PAIRS = 4  # time of a multiply-add in attention, where each row reads the keys again, over one with a weight
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class _Matrix(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("scale", c_void_p), ("kind", c_int64)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("norm1", "q_norm", "k_norm", "norm2")),
        *((name, _Matrix) for name in ("qkv", "out", "router", "gate", "up", "down")),
        ("experts", c_int64), ("gate_stride", c_int64), ("k", c_void_p), ("v", c_void_p),
    ]  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("width", "heads", "groups", "head", "ffn", "chosen", "layers", "vocabulary")),
        ("page", c_int64), ("cache", c_int64), ("eps", c_float), ("frequencies", c_void_p), ("norm", c_void_p),
        ("embedding", _Matrix), ("lm_head", _Matrix), ("layer", POINTER(_Layer)),
    ]  # fmt: skip


@cache
def library() -> "ctypes.CDLL | None":
    """Return the compiled code, from the user's cache if it was compiled before; warn and return None if that fails."""
    try:
        if os.name != "posix":  # FLAGS are for POSIX compilers
            why = f"{SOURCE.name} is compiled only on POSIX systems"
        else:
            usual = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
            compiler = shlex.split(os.environ.get("CXX", "")) or ([usual] if usual else [])
            if compiler:
                return compiled(SOURCE, compiler, FLAGS, lambda: cache_folder().parent / "native")
            why = "no C++ compiler found"
    except (CannotCompile, OSError, ValueError) as error:  # ValueError: CXX has an open quotation mark
        why = f"cannot compile {SOURCE.name}: {error}"
    warnings.warn(f"{why}; each token is decoded by many calls of torch instead of one", stacklevel=2)
    return None


def step_of(decoder: nn.Module, head: nn.Module, cache: Cache) -> "Step | None":
    """Return the step of a decoder, or None where it cannot run.

    It runs neither on a GPU nor in fp16 nor with torchao's weights, nor where decode.cpp cannot be compiled.
    decoder, head: a DecoderLM and its Head, or the two modules that quantize.py returns for them.
    """
    supported = all(
        type(p) is nn.Parameter and p.dtype in KINDS and p.is_contiguous() and not name.endswith("bias")
        for name, p in decoder.named_parameters()
    )
    on_cpu = supported and cache.k.device.type == "cpu"
    return Step(decoder, head, cache, code) if on_cpu and (code := library()) else None


class Step:
    """Run a decoder and its head over a cache; the weights are used in place, not copied."""

    def __init__(self, decoder: Any, head: Any, cache: Cache, code: ctypes.CDLL):
        c = decoder.config
        self.vocabulary, self.code, self._alive = c.vocabulary, code, [cache.k, cache.v]
        self._arguments = decoder, head, cache
        layers = (_Layer * c.layers)()
        for layer, block, k, v in zip(layers, decoder.blocks, cache.k, cache.v):
            a, mlp = block.attention, block.mlp
            layer.norm1, layer.norm2 = self._vector(block.norm1.weight), self._vector(block.norm2.weight)
            if c.qk_norm:
                layer.q_norm, layer.k_norm = self._vector(a.q_norm.weight), self._vector(a.k_norm.weight)
            layer.qkv, layer.out = self._linear(a.qkv), self._linear(a.out)
            layer.k, layer.v, layer.experts = k.data_ptr(), v.data_ptr(), 1
            if hasattr(mlp, "router"):
                layer.experts, layer.gate_stride = c.experts, 2 * c.ffn
                layer.router = self._linear(mlp.router)
                gate_up, scale = mlp.gate_up, getattr(mlp, "gate_up_scale", None)
                layer.gate = self._matrix(gate_up, scale)
                layer.up = self._matrix(gate_up[:, c.ffn :], None if scale is None else scale[:, c.ffn :])
                layer.down = self._matrix(mlp.down, getattr(mlp, "down_scale", None))
            else:
                layer.gate, layer.up, layer.down = map(self._linear, (mlp.gate, mlp.up, mlp.down))
        frequencies = c.rope_theta ** (-torch.arange(0, c.head_width, 2, dtype=torch.float32) / c.head_width)
        mlp = 3 * c.ffn * (c.experts_per_token if c.experts else 1)
        self._row = c.layers * c.width * ((2 * c.heads + 2 * c.kv_heads) * c.head_width + mlp)
        self._pair = PAIRS * 2 * c.layers * c.heads * c.head_width
        self._model = _Model(
            c.width, c.heads, c.kv_heads, c.head_width, c.ffn, max(c.experts_per_token, 1), c.layers, c.vocabulary,
            PAGE, KINDS[cache.k.dtype], c.eps, self._vector(frequencies), self._vector(decoder.norm.weight),
            self._matrix(decoder.embedding.weight), self._linear(head), layers,
        )  # fmt: skip

    def is_faster(self, rows: int, pairs: int) -> bool:
        """Return whether this step is faster than torch. pairs: keys that a row attends to, summed over the rows."""
        return rows * self._row + pairs * self._pair <= PRODUCTS

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the arguments of step_of to pickle, because addresses and code belong to this process."""
        return step_of, self._arguments

    def _vector(self, x: Any) -> int:
        self._alive.append(x.detach().float().contiguous())
        return self._alive[-1].data_ptr()

    def _linear(self, module: nn.Module) -> _Matrix:
        return self._matrix(module.weight, getattr(module, "scale", None))

    def _matrix(self, weight: Any, scale: Tensor | None = None) -> _Matrix:
        """Return a matrix for decode.cpp. scale: of each row of int8 weights."""
        self._alive += [weight, scale]
        return _Matrix(weight.data_ptr(), None if scale is None else scale.data_ptr(), KINDS[weight.dtype])

    def __call__(
        self, rows: Sequence[int] | Tensor, positions: Sequence[int] | np.ndarray, tables: Sequence[np.ndarray],
        outputs: Sequence[int] | np.ndarray | None = None,
    ) -> tuple[Tensor, list[int], list[float]]:  # fmt: skip
        """Return logits fp32 [B, V], the likeliest tokens and their log-probabilities after B of the new rows.

        rows: token ids, or embeddings fp32 [T, D]; positions: of the rows in their texts; tables int32: the pages of
        each row's text; outputs: indices of the B rows, None for all. A row attends to its text's cached rows and to
        its new rows up to itself.
        """
        outputs = np.arange(len(positions)) if outputs is None else np.array(outputs, np.int64)
        logits, best = torch.empty(len(outputs), self.vocabulary), np.empty(len(outputs), np.int64)
        logprobs = np.empty(len(outputs), np.float32)
        inputs = rows.contiguous().numpy() if isinstance(rows, Tensor) else np.array(rows, np.int64)
        ids_and_embeddings = (None, inputs) if isinstance(rows, Tensor) else (inputs, None)
        pages = np.array([table.ctypes.data for table in tables], np.uintp)
        sources = (*ids_and_embeddings, np.array(positions, np.int64), pages)
        self.code.decode(
            ctypes.byref(self._model), c_int64(len(positions)),
            *(c_void_p(None if x is None else x.ctypes.data) for x in sources), c_int64(len(outputs)),
            *(c_void_p(x.ctypes.data) for x in (outputs, logits.numpy(), best, logprobs)),
            c_int(torch.get_num_threads()),
        )  # fmt: skip
        return logits, best.tolist(), logprobs.tolist()
