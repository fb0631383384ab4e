"""The CPU's decoding step beside the decoder it stands for."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import relative_error
from small import small_mm1

from mm1.engine.infer import compiled, decode
from mm1.engine.infer.cache import PAGE, Cache
from mm1.engine.infer.decode import PRODUCTS, step_of
from mm1.engine.layers import quantize
from mm1.engine.layers.blocked import Head
from mm1.engine.layers.quantize import Linear4, quantized

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
    monkeypatch.setattr(quantize, "MIN_NUMBERS", 1)
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


def test_a_compiler_that_hangs_costs_a_line_and_torch_decodes(monkeypatch, tmp_path):
    decoder, compiler = small_mm1().eval().decoder, tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nsleep 600\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(compiled, "LIMIT", 0.2)
    decode.library.cache_clear()
    cache = Cache(decoder.config, 1, torch.device("cpu"), torch.float32)
    with pytest.warns(UserWarning, match=r"cannot compile decode.cpp: .*compiler took longer than 0.2 s; each token"):
        assert step_of(decoder, Head(decoder), cache) is None
    decode.library.cache_clear()


def first_step(decoder, dtype=torch.float32, tokens=(7,)):
    cache = Cache(decoder.config, len(tokens), torch.device("cpu"), dtype)
    tables = [np.array([b], np.int32) for b in range(len(tokens))]
    return step_of(decoder, Head(decoder), cache)(list(tokens), [0] * len(tokens), tables)[0], cache


def test_keys_and_values_are_rounded_to_the_nearest():
    decoder = small_mm1().eval().bfloat16().decoder
    exact = small_mm1().eval().decoder
    exact.load_state_dict({name: p.float() for name, p in decoder.state_dict().items()})
    tokens = range(10, 40)
    for kept, truth in zip(
        *(
            cache.v[0, :, 0]
            for _, cache in (first_step(decoder, torch.bfloat16, tokens), first_step(exact, tokens=tokens))
        )
    ):
        away = (kept.float() - truth).abs() / (truth.abs() * 2**-8 + 1e-30)
        assert away.max() < 1.001  # half a unit in the last of 8 bits; cut off, nearly twice


def test_of_equal_experts_the_first_are_chosen():
    """As by route; all logits are zero."""
    decoder = small_mm1(experts=5, moe_every=1).eval().decoder
    with torch.inference_mode():
        for block in decoder.blocks:
            block.mlp.router.weight.zero_()
        x, cu_seqlens = decoder.embedding(torch.tensor([7])), torch.tensor([0, 1], dtype=torch.int32)
        truth = decoder(x, torch.tensor([0]), cu_seqlens)[0] @ decoder.head_weight.T
    assert relative_error(first_step(decoder)[0], truth) < 1e-5


def test_scores_and_logits_of_hundreds_overflow_nothing():
    """Norms of 40 make scores of thousands, of either sign; a head of 300 logits of hundreds."""
    decoder = small_mm1(tied=False).eval().decoder
    with torch.inference_mode():
        for block in decoder.blocks:
            block.attention.q_norm.weight.fill_(40.0)
            block.attention.k_norm.weight.fill_(40.0)
        decoder.head.weight.mul_(300)
        ids = torch.arange(10, 50)
        cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
        hidden = decoder(decoder.embedding(ids), torch.arange(len(ids)), cu_seqlens)[0]
        truth = (hidden @ decoder.head_weight.T)[-1:]
        cache = Cache(decoder.config, 3, torch.device("cpu"), torch.float32)
        tables = [np.arange(3, dtype=np.int32)] * len(ids)
        step = step_of(decoder, Head(decoder), cache)
        logits, best, logprobs = step(ids.tolist(), range(len(ids)), tables, [len(ids) - 1])
    assert relative_error(logits, truth) < 1e-4
    assert best == truth.argmax(-1).tolist()
    assert abs(logprobs[0] - float(truth.log_softmax(-1).max())) < 1e-3


def test_a_cache_of_more_than_2_to_31_numbers():
    """Its memory is never touched but for two pages, of one layer's keys, which are its values as well."""
    decoder = (
        small_mm1(layers=1, experts=0, heads=32, kv_heads=32, head_width=128, width=8, ffn=8).eval().bfloat16().decoder
    )
    pages = (1 << 31) // (PAGE * 32 * 128) + 2
    store = torch.from_numpy(np.zeros((1, pages, PAGE, 32, 128), np.int16)).view(torch.bfloat16)
    step = step_of(decoder, Head(decoder), SimpleNamespace(k=store, v=store))
    first, last = (step([7], [0], [np.array([page], np.int32)])[0] for page in (0, pages - 1))
    assert torch.equal(first, last)
    assert store[0, pages - 1, 0].any()


def test_a_prompt_is_for_one_call_while_its_products_are_few():
    """All but the head's: of a mixture those of the chosen experts."""
    for experts, chosen in ((0, 1), (5, 2)):
        decoder = small_mm1(experts=experts, experts_per_token=2, moe_every=1).eval().decoder
        a, mlp = decoder.blocks[0].attention, 3 * 40 * 32 * chosen
        row = 2 * (a.qkv.weight.numel() + a.out.weight.numel() + mlp)
        step = step_of(decoder, Head(decoder), Cache(decoder.config, 1, torch.device("cpu"), torch.float32))
        assert step.is_faster(PRODUCTS // row, 0)
        assert not step.is_faster(PRODUCTS // row + 1, 0)
        assert not step.is_faster(1, PRODUCTS)  # a row behind so many keys


def test_another_processor_compiles_anew(monkeypatch, tmp_path):
    """A home folder may be shared by several machines."""
    monkeypatch.setenv("MM1_CACHE", str(tmp_path))
    monkeypatch.setattr(decode, "FLAGS", ("-std=c++17", "-O0", "-fopenmp", "-shared", "-fPIC"))
    for processor in ("one", "another", "one"):
        monkeypatch.setattr(compiled, "processor", lambda name=processor: name)
        decode.library.cache_clear()
        assert decode.library()
    decode.library.cache_clear()
    assert len(list((tmp_path / "native").iterdir())) == 2


def test_windows_does_without_even_where_a_compiler_is_named(monkeypatch):
    """None of os.uname, os.geteuid and os.killpg is there."""
    monkeypatch.setattr(decode, "os", SimpleNamespace(name="nt", environ={"CXX": "c++"}))
    monkeypatch.setattr(compiled, "os", SimpleNamespace(name="nt"))
    decode.library.cache_clear()
    with pytest.warns(
        UserWarning, match=r"^decode.cpp is compiled only on POSIX systems; each token is decoded by many"
    ):
        assert decode.library() is None
    decode.library.cache_clear()
