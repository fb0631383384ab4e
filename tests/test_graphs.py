"""What a CUDA graph of the decoding step would hold, run without one."""

import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import compiles, relative_error
from small import SLOTS, document, small_mm1, small_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from two_gpus import TwoGPUs

from mm1.engine.infer import graphs
from mm1.engine.infer.cache import PAGE, Cache
from mm1.engine.infer.decode import step_of
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.graphs import Captured, Graphs, Kind
from mm1.engine.infer.prompts import sample_document
from mm1.engine.infer.sampling import Draw, Sampling
from mm1.engine.layers.blocked import Head
from mm1.engine.models.mm1 import MM1
from mm1.kernels.attention import paged
from mm1.kernels.device import DEVICES
from mm1.kernels.dispatch import recording
from mm1.kernels.moe import experts, routing


@pytest.mark.parametrize("experts", [0, 4])
def test_a_step_of_any_number_of_documents_compiles_few_times_and_is_right(experts, monkeypatch):
    """One code for one row, one for more, before attention and after it; a mixture has two kinds of the latter."""
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
                whole = torch.from_numpy(
                    ours.inputs(Kind(size, 20 if size == 4 else 40, False), tokens, positions, tables[:count])
                )
                with torch.inference_mode():
                    logits, chosen = ours.step(whole, None)
                expected, best, logprobs = truth(tokens, positions, tables[:count])
                assert relative_error(logits[:count], expected) < 1e-5
                assert chosen[:count, 0].tolist() == best
                assert chosen[:count, 1].tolist() == pytest.approx(logprobs, abs=1e-5)
    assert counter.frame_count <= 2 * (3 if experts else 2)


def test_rows_that_are_not_needed_touch_their_own_page_alone(monkeypatch):
    monkeypatch.setattr(graphs.torch, "compile", lambda f, **_: f)
    decoder = small_mm1().eval().decoder
    cache = Cache(decoder.config, 6, torch.device("cpu"), torch.float32)
    cache.k.zero_()
    ours = Graphs(decoder, Head(decoder), cache, 4)
    with torch.inference_mode():
        ours.step(torch.from_numpy(ours.inputs(Kind(4, 6, False), [9], [0], [np.array([3], np.int32)])), None)
    touched = {page for page in range(6) if bool(cache.k[:, page].any())}
    assert touched == {ours.spare, 3}
    assert ours.whole.shape == (4, 2 + 6)


def test_settings_of_each_row_are_obeyed_inside(monkeypatch):
    monkeypatch.setattr(graphs.torch, "compile", lambda f, **_: f)
    decoder = small_mm1().eval().decoder
    ours = Graphs(decoder, Head(decoder), Cache(decoder.config, 8, torch.device("cpu"), torch.float32), 4)
    tables = [np.array([p], np.int32) for p in (2, 3, 4, 5)]
    whole = torch.from_numpy(ours.inputs(Kind(4, 8, True), [9] * 4, [0] * 4, tables))
    draws = torch.tensor([Draw(0.0, 1, 0, 0.5), Draw(5.0, 1, 1, 0.9), Draw(5.0, 1, 2, 0.999), Draw(5.0, 1, 0, 0.999)])
    with torch.inference_mode():
        logits, chosen = ours.step(whole, draws)
    order = logits[0].argsort(descending=True).tolist()
    assert chosen[:3, 0].tolist() == [order[0], order[0], order[1]]
    assert order.index(int(chosen[3, 0])) > 10
    assert torch.allclose(chosen[:, 1], logits.log_softmax(-1)[range(4), chosen[:, 0].long()].double())


@pytest.mark.parametrize("number", [0, 4])
def test_compiled_code_never_sees_the_cache(number, monkeypatch):
    """Inductor may copy what code writes into, and a copy of the cache would cost a step more than all weights do."""
    torch._dynamo.reset()
    seen, compiled = [], torch.compile

    def backend(module, _):
        def run(*inputs):
            seen.extend(x for x in (*inputs, *module.parameters(), *module.buffers()) if isinstance(x, torch.Tensor))
            return module(*inputs)

        return run

    monkeypatch.setattr(graphs.torch, "compile", lambda f, **options: compiled(f, backend=backend, **options))
    decoder = small_mm1(experts=number).eval().decoder
    cache = Cache(decoder.config, 41, torch.device("cpu"), torch.float32)
    ours = Graphs(decoder, Head(decoder), cache, 8)
    tables = [np.array([p], np.int32) for p in range(1, 6)]
    with torch.inference_mode():
        ours.step(torch.from_numpy(ours.inputs(Kind(8, 40, False), [5] * 5, [3] * 5, tables)), None)
    storages = {x.untyped_storage().data_ptr() for x in seen}
    assert {p.untyped_storage().data_ptr() for p in decoder.blocks.parameters()} <= storages
    assert not storages & {x.untyped_storage().data_ptr() for x in (cache.k, cache.v)}


class Seen(TorchDispatchMode):
    """Record the calls of this project's ops; `bodies` run in their place, with their launches being recorded."""

    def __init__(self, bodies=()):
        super().__init__()
        self.bodies, self.ops, self.inside, self.depth = dict(bodies), [], [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if self.depth and not op.is_view and "empty" not in str(op):
            self.inside.append(str(op))
        if not str(op).startswith("mm1."):
            return op(*args, **kwargs or {})
        self.ops.append((str(op).split(".")[1], args))
        if not self.bodies:
            return op(*args, **kwargs or {})
        self.depth += 1
        with self:
            result = self.bodies[str(op).split(".")[1]](*args, **kwargs or {})
        self.depth -= 1
        return result


@compiles
@pytest.mark.parametrize("size", [1, 8])
def test_a_mixture_layer_launches_six_kernels_and_a_dense_layer_two(size, monkeypatch):
    """Beside products and what torch compiles; ops have no torch code inside, which nothing would fuse."""
    monkeypatch.setattr(graphs.torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no "meta"
    with torch.device("meta"):
        decoder = MM1(small_model(experts=8, layers=4)).bfloat16().decoder
    cache = Cache(decoder.config, 40, torch.device("meta"), torch.bfloat16)
    ours, whole = Graphs(decoder, Head(decoder), cache, 8), torch.empty(size, 42, dtype=torch.int32, device="meta")
    bodies = {
        "paged_attention": paged.forward, "choose_experts": routing.choose_forward, "moe_mlp_few": experts.moe_mlp_few
    }  # fmt: skip
    with torch.inference_mode(), recording(DEVICES["h200"]) as launches, Seen(bodies) as seen:
        ours.step(whole, None)
    attention = ["_paged_kernel", "_merge_kernel"]
    mixture = ["_route_kernel", "_few_kernel", "_few_kernel", "_combine_kernel"]
    assert [launch.name for launch in launches] == 2 * [*attention, *attention, *mixture]
    assert not seen.inside


@torch.inference_mode()
def test_rows_that_are_not_needed_read_no_expert(monkeypatch):
    monkeypatch.setattr(graphs.torch, "compile", lambda f, **_: f)
    decoder = small_mm1(experts=4, experts_per_token=2, moe_every=1).eval().decoder
    ours = Graphs(decoder, Head(decoder), Cache(decoder.config, 9, torch.device("cpu"), torch.float32), 8)
    tables = [np.array([p], np.int32) for p in range(1, 6)]
    with Seen() as seen:
        ours.step(torch.from_numpy(ours.inputs(Kind(8, 9, False), [9] * 5, [0] * 5, tables)), None)
    ends = [args[1][2] for name, args in seen.ops if name == "moe_mlp"]  # of the experts' slots
    assert [int(end[-1]) for end in ends] == [5 * 2] * len(decoder.blocks)


class Replayed(Graphs):
    """_capture without CUDA: a replay runs the step and copies into what it returned."""

    def _capture(self, kind):
        whole, draws = self._static_inputs(kind)
        logits, chosen = self.step(whole, draws if kind.sampled else None)
        self.captures = [*getattr(self, "captures", []), kind]

        def replay():
            for kept, new in zip((logits, chosen), self.step(whole, draws if kind.sampled else None)):
                kept.copy_(new)

        return Captured(type("Graph", (), {"replay": staticmethod(replay)}), whole, draws, logits, chosen)


class OnSecondGPU(Graphs):
    """Run on the CPU as if the weights were on cuda:1: a step is captured if that device's stream is being captured."""

    def __init__(self, gpus, *arguments):
        super().__init__(*arguments)
        self.gpus, self.device = gpus, torch.device("cuda:1")

    def _static_inputs(self, kind):
        assert self.device == torch.device("cuda:1")
        self.device = torch.device("cpu")
        inputs = super()._static_inputs(kind)
        self.device = torch.device("cuda:1")
        return inputs

    def step(self, whole, draws):
        logits, chosen = super().step(whole, draws)
        graph, stream = self.gpus.capturing or (None, None)
        if stream is self.gpus.current_stream(self.device):

            def again():
                for kept, new in zip((logits, chosen), super(OnSecondGPU, self).step(whole, draws)):
                    kept.copy_(new)

            graph.captured.append(again)
        return logits, chosen


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_model_on_the_second_gpu_is_captured_and_replayed_there(in_thread, monkeypatch):
    """The first device is current, and has captured before."""
    monkeypatch.setattr(graphs.torch, "compile", lambda f, **_: f)
    gpus = TwoGPUs()
    gpus.replace(monkeypatch)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        assert gpus.capturing[1].device.index == 0
    decoder = small_mm1().eval().decoder
    cache = Cache(decoder.config, 4, torch.device("cpu"), torch.float32)
    ours, truth = OnSecondGPU(gpus, decoder, Head(decoder), cache, 2), step_of(decoder, Head(decoder), cache)
    results = []

    @torch.inference_mode()
    def decode():
        for token in (9, 8, 7):  # the first is captured, the others replay
            results.append(ours([token], [0], [np.array([2], np.int32)], [Draw(0.0, 1.0, 0, 0.0)])[1])

    if in_thread:
        thread = threading.Thread(target=decode)
        thread.start()
        thread.join()
    else:
        decode()
    assert results == [truth([token], [0], [np.array([2], np.int32)])[1] for token in (9, 8, 7)]
    assert [(c.graph.device, len(c.graph.captured)) for c in ours.captured.values()] == [(1, 1)]
    assert gpus.state.device == 0


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
    sizes = (4, True), (4, False), (2, True), (1, False), (8, True), (8, False)
    assert set(ours.captured) == {Kind(size, 9, sampled) for size, sampled in sizes}


def on_graphs(model, kind=Engine, **settings):
    """Return an engine that decodes as on a GPU."""
    engine = kind(model, **settings)
    engine.cache = Cache(model.config.decoder, engine.pages + 1, torch.device("cpu"), torch.float32)
    engine.schedule.cache = engine.cache
    engine.graphs = Replayed(engine.decoder, engine.head, engine.cache, engine.batch, engine.context // PAGE)
    engine.one_step = None
    return engine


def test_after_the_warm_up_no_request_waits_for_a_capture(monkeypatch):
    """Texts of any length and number, greedy and drawn, with and without images, find their graphs."""
    monkeypatch.setattr(graphs.torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(graphs, "PAGES", 4)
    model = small_mm1(experts=4).eval()
    engine, random = on_graphs(model, tokens=512, batch=4), np.random.default_rng(0)
    for _ in engine.warm_up():
        engine.step()
    assert engine.encoded == 1
    kinds = [Kind(n, pages, sampled) for n in (1, 2, 4) for pages in (4, 32) for sampled in (False, True)]
    assert sorted(engine.graphs.captures) == kinds
    requests = []
    for number in range(6):
        settings = Sampling(max_tokens=int(random.integers(2, 10)), temperature=float(number % 2), seed=number)
        parts = [(3, 40, 200)[number % 3]] + [(2, 2)] * (number % 3 == 0)
        requests.append((document(*parts), settings))
    submitted = [engine.submit(*request) for request in requests]
    engine.run()
    assert sorted(engine.graphs.captures) == kinds
    for request, ours in zip(requests, submitted):
        alone = Engine(model, tokens=512)
        truth = alone.submit(*request)
        alone.run()
        assert ours.tokens == truth.tokens
    assert engine.cache.available == engine.pages


@pytest.mark.parametrize(("prefill", "numbers"), [(600, [8, 32, 64, 128, 512, 600]), (40, [8, 32, 40])])
def test_the_warm_up_has_prompts_of_many_sizes_alone_and_behind_a_cached_page(prefill, numbers, monkeypatch):
    """Kernels depend on the number of rows, and on whether keys are in the cache."""
    monkeypatch.setattr(graphs.torch, "compile", lambda f, **_: f)
    engine, seen = on_graphs(small_mm1().eval(), tokens=1024, batch=1, prefill=prefill), []
    rows = engine.cache.rows
    engine.cache.rows = lambda tables, starts, ends: seen.append((*starts, *ends)) or rows(tables, starts, ends)
    for _ in engine.warm_up():
        engine.step()
    for number in numbers:
        assert (0, number) in seen
        assert (PAGE, PAGE + number) in seen
    assert not engine.running


def test_a_context_without_room_for_an_image_is_warmed_up_with_text(monkeypatch):
    monkeypatch.setattr(graphs.torch, "compile", lambda f, **_: f)
    model = small_mm1().eval()
    assert [view.values.shape for view in sample_document(model, 40).media] == [(32, 32, 3)]
    assert sample_document(model, SLOTS).media == ()  # no room for an image and a text
    engine = on_graphs(model, tokens=PAGE, batch=1)
    for _ in engine.warm_up():
        engine.step()
    assert len(engine.graphs.captures) == 2
