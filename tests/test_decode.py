"""The CPU's decoding step beside the decoder it stands for."""

import shutil

import numpy as np
import pytest
import torch
from conftest import relative_error
from small import small_mm1

from mm1.engine import decode, quantize
from mm1.engine.cache import PAGE, Cache
from mm1.engine.decode import step_of
from mm1.engine.packed import Head
from mm1.engine.quantize import Linear4, quantized

VARIANTS = {
    "as it is": {},
    "dense": {"experts": 0, "experts_per_token": 0},
    "mixture": {"experts": 5, "moe_every": 1},
    "one expert": {"experts": 1, "experts_per_token": 1},
    "no q and k norms": {"qk_norm": False, "tied": False},
    "all heads in one group": {"kv_heads": 1},
    "odd widths": {"width": 45, "ffn": 37, "head_width": 6, "experts": 3, "experts_per_token": 3, "vocabulary": 387},
    "wide": {"width": 160, "head_width": 64, "ffn": 200},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_give_what_the_decoder_gives(name, dtype):
    """Documents of unequal lengths, over the ends of pages that lie anywhere; one to nineteen at once."""
    decoder = small_mm1(**VARIANTS[name]).eval().to(dtype).decoder
    exact = small_mm1(**VARIANTS[name]).eval().decoder
    exact.load_state_dict({name: p.float() for name, p in decoder.state_dict().items()})
    random, c, lengths = np.random.default_rng(0), decoder.config, [3 * PAGE + 5, 0, 1, PAGE, *range(2, 17)]
    cache = Cache(c, 100, torch.device("cpu"), dtype)
    places = random.permutation(100).astype(np.int32)
    tables = [places[4 * b : 4 * b + 4] for b in range(len(lengths))]
    ids = [random.integers(4, c.vocabulary, length + 1) for length in lengths]
    step = step_of(decoder, Head(decoder), cache)
    assert step
    with torch.inference_mode():
        for position in range(max(lengths) + 1):  # from nothing on; some begin later, that all end at once
            going = [b for b, length in enumerate(lengths) if length >= max(lengths) - position]
            at = [position - (max(lengths) - lengths[b]) for b in going]
            logits, best, logprobs = step([int(ids[b][i]) for b, i in zip(going, at)], at, [tables[b] for b in going])
        flat = torch.from_numpy(np.concatenate(ids))
        ends = np.cumsum([0, *map(len, ids)], dtype=np.int32)
        positions = torch.from_numpy(np.concatenate([np.arange(len(x)) for x in ids]))
        hidden = exact(exact.embedding(flat), positions, torch.from_numpy(ends))[0]
        truth = (hidden @ exact.head_weight.T)[torch.from_numpy(ends[1:]).long() - 1]
    assert relative_error(logits, truth) < (1e-5 if dtype == torch.float32 else 2e-2)
    if dtype == torch.float32:
        assert best == truth.argmax(-1).tolist()
        assert torch.tensor(logprobs) == pytest.approx(truth.log_softmax(-1).amax(-1), abs=1e-5)


def test_a_documents_bits_do_not_depend_on_who_else_is_there():
    decoder = small_mm1(width=72, experts=4).eval().decoder

    def run(tokens):
        cache = Cache(decoder.config, len(tokens), torch.device("cpu"), torch.float32)
        step = step_of(decoder, Head(decoder), cache)
        tables = [np.array([b], np.int32) for b in range(len(tokens))]
        for position in range(3):
            logits, _, _ = step([t + position for t in tokens], [position] * len(tokens), tables)
        return logits

    tokens = list(range(10, 33))
    together = run(tokens)
    for count in (1, 2, 3, 5, 8, 9):
        assert torch.equal(run(tokens[:count]), together[:count])


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("how", ["int8", "int4"])
def test_narrow_weights_are_used_as_they_are(how, experts, monkeypatch):
    """int8 by rows, in fp32; what torchao packs goes by torch."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantize, "LEAST", 1)
    decoder = small_mm1(experts=experts, moe_every=1).eval().decoder
    narrow, head = quantized(decoder, how)
    caches = [Cache(decoder.config, 1, torch.device("cpu"), torch.float32) for _ in range(2)]
    step, table = step_of(narrow, head, caches[0]), [np.zeros(1, np.int32)]
    if any(isinstance(module, Linear4) for module in narrow.modules()):
        assert step is None
        return
    wide = small_mm1(experts=experts, moe_every=1).eval().decoder
    for name, module in narrow.blocks.named_modules():
        for weight in ("weight", "gate_up", "down"):
            scale = getattr(module, "scale" if weight == "weight" else f"{weight}_scale", None)
            if scale is not None:
                wide.get_parameter(f"blocks.{name}.{weight}").data = getattr(module, weight) * scale[..., None]
    wide_head = Head(wide)
    wide_head.weight = torch.nn.Parameter(head.weight * head.scale[:, None])
    truth = step_of(wide, wide_head, caches[1])
    for position in range(3):
        found, expected = (s([9 + position], [position], table)[0] for s in (step, truth))
    assert relative_error(found, expected) < 1e-5


def test_threads_change_nothing():
    decoder = small_mm1(width=72, experts=4).eval().decoder
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        cache = Cache(decoder.config, 1, torch.device("cpu"), torch.float32)
        found.append(step_of(decoder, Head(decoder), cache)([7], [0], [np.zeros(1, np.int32)])[0])
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_without_a_compiler_torch_decodes_and_it_is_said(monkeypatch, tmp_path):
    decoder = small_mm1().eval().decoder
    cache = Cache(decoder.config, 1, torch.device("cpu"), torch.float32)
    monkeypatch.setenv("MM1_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for found, message in ((None, "no C\\+\\+ compiler"), ("/bin/false", "cannot compile decode.cpp")):
        monkeypatch.setattr(shutil, "which", lambda name, found=found: found)
        decode.library.cache_clear()
        with pytest.warns(UserWarning, match=message):
            assert step_of(decoder, Head(decoder), cache) is None
    decode.library.cache_clear()
    half = small_mm1().half().decoder
    assert step_of(half, Head(half), Cache(half.config, 1, torch.device("cpu"), torch.float16)) is None
