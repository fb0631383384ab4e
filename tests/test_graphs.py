"""What a CUDA graph of the decoding step would hold, run without one."""

import numpy as np
import pytest
import torch
from conftest import relative_error
from small import small_mm1
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from mm1.engine.infer import graphs
from mm1.engine.infer.cache import PAGE, Cache
from mm1.engine.infer.decode import step_of
from mm1.engine.infer.graphs import PAGES, Captured, Graphs
from mm1.engine.infer.sampling import Draw
from mm1.engine.layers.blocked import Head


@pytest.mark.parametrize("experts", [0, 4])
def test_a_step_of_any_number_of_documents_compiles_few_times_and_is_right(experts, monkeypatch):
    """One row, and then all other numbers by one code; a dense model has one kind of block, a mixture two."""
    torch._dynamo.reset()
    counter, compiled = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(graphs.torch, "compile", lambda f, **options: compiled(f, backend=counter, **options))
    decoder = small_mm1(experts=experts).eval().decoder
    caches = [Cache(decoder.config, 40, torch.device("cpu"), torch.float32) for _ in range(2)]
    ours, truth = Graphs(decoder, Head(decoder), caches[0], 8), step_of(decoder, Head(decoder), caches[1])
    assert truth
    random = np.random.default_rng(0)
    tables = random.permutation(np.arange(1, 40)).astype(np.int32)[:32].reshape(8, 4)  # the first page is spare
    for size, counts in ((1, [1]), (8, [5, 8]), (4, [3]), (2, [2])):
        for count in counts:
            for position in (0, 1, PAGE - 1, PAGE, 3 * PAGE):
                for cache in caches:  # as if all before it were there
                    cache.k.normal_(generator=torch.Generator().manual_seed(position))
                    cache.v.normal_(generator=torch.Generator().manual_seed(position + 1))
                tokens, positions = random.integers(4, 300, count).tolist(), [position + i % 3 for i in range(count)]
                whole = torch.from_numpy(ours.inputs(size, tokens, positions, tables[:count]))
                with torch.inference_mode():
                    logits, chosen = ours.step(whole, None)
                expected, best, logprobs = truth(tokens, positions, tables[:count])
                assert relative_error(logits[:count], expected) < 1e-5
                assert chosen[:count, 0].tolist() == best
                assert chosen[:count, 1].tolist() == pytest.approx(logprobs, abs=1e-5)
    assert counter.frame_count <= 2 * (2 if experts else 1)


def test_rows_that_are_not_needed_touch_their_own_page_alone(monkeypatch):
    monkeypatch.setattr(graphs.torch, "compile", lambda f, **_: f)
    decoder = small_mm1().eval().decoder
    cache = Cache(decoder.config, 6, torch.device("cpu"), torch.float32)
    cache.k.zero_()
    ours = Graphs(decoder, Head(decoder), cache, 4)
    with torch.inference_mode():
        ours.step(torch.from_numpy(ours.inputs(4, [9], [0], [np.array([3], np.int32)])), None)
    touched = {page for page in range(6) if bool(cache.k[:, page].any())}
    assert touched == {ours.spare, 3}
    assert ours.whole.shape == (4, 2 + PAGES)


def test_settings_of_each_row_are_obeyed_inside(monkeypatch):
    monkeypatch.setattr(graphs.torch, "compile", lambda f, **_: f)
    decoder = small_mm1().eval().decoder
    ours = Graphs(decoder, Head(decoder), Cache(decoder.config, 8, torch.device("cpu"), torch.float32), 4)
    whole = torch.from_numpy(ours.inputs(4, [9] * 4, [0] * 4, [np.array([p], np.int32) for p in (2, 3, 4, 5)]))
    draws = torch.tensor([Draw(0.0, 1, 0, 0.5), Draw(5.0, 1, 1, 0.9), Draw(5.0, 1, 2, 0.999), Draw(5.0, 1, 0, 0.999)])
    with torch.inference_mode():
        logits, chosen = ours.step(whole, draws)
    order = logits[0].argsort(descending=True).tolist()
    assert chosen[:3, 0].tolist() == [order[0], order[0], order[1]]
    assert order.index(int(chosen[3, 0])) > 10
    assert torch.allclose(chosen[:, 1], logits.log_softmax(-1)[range(4), chosen[:, 0].long()].double())


@pytest.mark.slow
def test_compiled_code_writes_into_the_cache_and_copies_none_of_it():
    """A copy would cost a step more than all weights do. Inductor's loops say over what they go."""
    torch._dynamo.reset()
    decoder = small_mm1(experts=0).eval().decoder
    cache = Cache(decoder.config, 40, torch.device("cpu"), torch.float32)
    ours = Graphs(decoder, Head(decoder), cache, 8)
    whole = torch.from_numpy(ours.inputs(8, [5] * 5, [3] * 5, [np.array([p], np.int32) for p in range(1, 6)]))
    with torch.inference_mode():
        _, [code] = run_and_get_code(ours.step, whole, None)
    assert "mm1.paged_attention" in code
    assert f"< static_cast<int64_t>({cache.k[0].numel()}L)" not in code
    assert f"< static_cast<int64_t>({40 * PAGE}L)" not in code
    assert code.count("empty_strided_cpu((640") == code.count("empty_strided_cpu((40, 16") == 0


class Replayed(Graphs):
    """_capture without CUDA: a replay runs the step and copies into what it returned."""

    def _capture(self, size, sampled):
        whole, draws = torch.from_numpy(self.inputs(size, [], [], []).copy()), torch.zeros(size, len(Draw._fields))
        logits, chosen = self.step(whole, draws if sampled else None)

        def replay():
            for kept, new in zip((logits, chosen), self.step(whole, draws if sampled else None)):
                kept.copy_(new)

        return Captured(type("Graph", (), {"replay": staticmethod(replay)}), whole, draws, logits, chosen)


@torch.inference_mode()
def test_calls_of_any_order_have_their_own_rows_and_draws(monkeypatch):
    monkeypatch.setattr(graphs.torch, "compile", lambda f, **_: f)
    decoder = small_mm1().eval().decoder
    ours = Replayed(decoder, Head(decoder), Cache(decoder.config, 9, torch.device("cpu"), torch.float32), 8)
    ours.cache.k.zero_()
    greedy, hot = Draw(0.0, 1.0, 0, 0.0), Draw(5.0, 1.0, 0, 0.999)

    def call(draws):
        tables = [np.array([1 + b], np.int32) for b in range(len(draws))]
        logits, tokens, logprobs = ours([9] * len(draws), [0] * len(draws), tables, draws)
        assert torch.allclose(logits, logits[:1], atol=1e-5)
        ranks = [logits[0].argsort(descending=True).tolist().index(token) for token in tokens]
        assert torch.allclose(logits[0].log_softmax(-1)[tokens], torch.tensor(logprobs), atol=1e-5)
        return [rank > 10 for rank in ranks]

    def pages():
        return ours.cache.k[:, 6:].clone()

    for draws in ([hot] * 3, [greedy] * 3, [greedy, hot, greedy], [hot, greedy], [greedy], [hot] * 8):
        assert call(draws) == [draw is hot for draw in draws]
    before = pages()
    assert call([greedy] * 5) == [False] * 5
    assert torch.equal(pages(), before)  # of those who had the rows that are spare now
    assert set(ours.captured) == {(4, True), (4, False), (2, True), (1, False), (8, True), (8, False)}
