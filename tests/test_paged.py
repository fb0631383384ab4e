"""Compare attention over pages in any places with attention over the same rows in order."""

import pytest
import torch
from conftest import DEVICE, compiles, mostly_slow, needs_triton, relative_error

from mm1.autotune.static import compile_launch
from mm1.kernels.attention import Causal, paged, paged_attention, reference
from mm1.kernels.attention.paged import PAGED, Config, PagedShape
from mm1.kernels.dispatch import DEVICES, INTERPRETED, power_of_2, recording
from mm1.kernels.tuning import listening, pinned

PAGE = 4
SEGMENTS = {  # (new rows, keys in all)
    "a token of each": [(1, 1), (1, 9), (1, 4), (1, 30)],
    "tokens that see equally many": [(1, 9)] * 3,
    "tokens of equally many pages": [(1, 9), (1, 12), (1, 11)],
    "prompts": [(5, 5), (1, 1), (7, 7)],
    "after prefixes": [(3, 20), (6, 8), (1, 17), (2, 2)],
    "some without": [(0, 5), (1, 6), (0, 0), (2, 9)],
}
HEADS = {"one group": (2, 1), "four groups": (4, 4), "two heads a group": (4, 2), "20 heads a group": (20, 1)}


def problem(segments, heads=(4, 2), width=16, dtype=torch.float32, side_by_side=False):
    """Return the arguments of a call, with pages in random order or in order, and NaN in all unused rows."""
    torch.manual_seed(0)
    H, G = heads
    need = [-(-length // PAGE) for _, length in segments]
    order = torch.arange(sum(need) + 3) if side_by_side else torch.randperm(sum(need) + 3)
    tables, start = torch.zeros(len(segments), max(need), dtype=torch.int32), 0
    for b, count in enumerate(need):
        tables[b, :count] = order[start : start + count]
        start += count
    k, v = torch.full((2, len(order), PAGE, G, width), float("nan"))
    rows = [torch.randn(2, length, G, width) for _, length in segments]
    for b, (own, (_, length)) in enumerate(zip(rows, segments)):
        for j in range(length):
            k[tables[b, j // PAGE], j % PAGE], v[tables[b, j // PAGE], j % PAGE] = own[:, j]
    new = torch.tensor([n for n, _ in segments])
    cu_q = torch.nn.functional.pad(new.cumsum(0), (1, 0)).int()
    q = torch.randn(int(cu_q[-1]), H, width)
    lengths = torch.tensor([length for _, length in segments], dtype=torch.int32)
    q, k, v = (x.to(DEVICE, dtype) for x in (q, k, v))
    return q, k, v, cu_q.to(DEVICE), tables.to(DEVICE), lengths.to(DEVICE), max(n for n, _ in segments), rows


def in_order(q, cu_q, lengths, rows):
    """Return the reference of packed attention in fp64 over the same rows in order."""
    k, v = torch.cat(rows, 1).double()
    cu_k = torch.nn.functional.pad(lengths.cpu().cumsum(0), (1, 0)).int()
    return reference.attention(q.double().cpu(), k, v, cu_q.cpu(), mask=Causal(), cu_seqlens_k=cu_k)


@pytest.mark.parametrize("side_by_side", [False, True], ids=["scattered", "in order"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_it_is_attention_over_the_rows_in_order(segments, heads, side_by_side):
    *tensors, rows, own = problem(segments, heads, side_by_side=side_by_side)
    truth = in_order(tensors[0], tensors[3], tensors[5], own)
    for y in (paged_attention(*tensors, rows=rows), reference.paged_attention(*tensors)):
        assert relative_error(y.cpu(), truth) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_that_begin_with_the_same_pages(dtype):
    """Three segments share pages, two others share other pages, one shares none; they have one or several new rows,
    which begin at the end of a page or within one."""
    segments = [(3, 37), (1, 34), (20, 55), (2, 21), (5, 24), (4, 40)]
    q, k, v, cu_q, tables, lengths, rows, own = problem(segments, dtype=torch.float32)
    for pattern, of, count in ((0, (1, 2), 2), (3, (4,), 1)):
        for b in of:
            tables[b, :count] = tables[pattern, :count]
            own[b][:, : count * PAGE] = own[pattern][:, : count * PAGE]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    y = paged_attention(q, k, v, cu_q, tables, lengths, rows=rows)
    truth = in_order(q, cu_q, lengths, [x.to(dtype) for x in own])
    assert relative_error(y.cpu(), truth) < (2e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("width", [16, 32, 80])
def test_widths_and_16_bits(width):
    *tensors, rows, own = problem(SEGMENTS["after prefixes"], width=width, dtype=torch.bfloat16)
    y = paged_attention(*tensors, rows=rows)
    assert y.dtype == torch.bfloat16
    own = [x.bfloat16() for x in own]
    assert relative_error(y.cpu(), in_order(tensors[0], tensors[3], tensors[5], own)) < 8e-3


@pytest.mark.parametrize("groups, parts", [(88, 1), (44, 2), (2, 8)])
def test_keys_split_over_programs_give_one_softmax(groups, parts):
    """A program has many blocks of keys, with a rising maximum, down to a single one."""
    *tensors, rows, own = problem([(1, 70), (2, 33), (1, 3)], heads=(groups, groups))
    config = Config(block_n=16)
    assert paged.splits(config, PagedShape(128, 3 * groups, 2, 16), DEVICES["h200"]) == parts
    with pinned(paged_attention=config):
        y = paged_attention(*tensors, rows=rows)
    assert relative_error(y.cpu(), in_order(tensors[0], tensors[3], tensors[5], own)) < 2e-6


@needs_triton
@pytest.mark.parametrize("width", [16, 80])
@pytest.mark.parametrize(
    "config",
    [Config(16, 16, programs=1), Config(32, 16, 2, 2, 8), Config(64, 32, 8, 1), Config(16, 64, 4, 4, 4)],
    ids=lambda config: "-".join(map(str, vars(config).values())),
)
def test_every_configuration_gives_the_same(config, width):
    """17 new rows of 4 heads are several tiles, or a part of one."""
    *tensors, rows, own = problem([(17, 40), (1, 70), (0, 9), (5, 5)], heads=(8, 2), width=width)
    with pinned(paged_attention=config):
        y = paged_attention(*tensors, rows=rows)
    assert relative_error(y.cpu(), in_order(tensors[0], tensors[3], tensors[5], own)) < 2e-6


def on_meta(B, rows, heads, groups, pages=256, width=128, dtype=torch.bfloat16, device="h200"):
    """Return the launches of a call with tensors without values, for which the host cannot wait."""
    q = torch.empty(B * rows, heads, width, device="meta", dtype=dtype)
    k = torch.empty(4096, 16, groups, width, device="meta", dtype=dtype)
    cu_q, lengths = (torch.empty(n, device="meta", dtype=torch.int32) for n in (B + 1, B))
    tables = torch.empty(B, pages, device="meta", dtype=torch.int32)
    with recording(DEVICES[device]) as recorded:
        paged.forward(q, k, k, cu_q, tables, lengths, rows)
    return recorded


def test_a_configuration_is_looked_up_by_what_the_host_knows():
    with listening() as looked:
        on_meta(64, 1, 32, 8)
        on_meta(3, 100, 24, 24, pages=129)
        on_meta(2, 5, 20, 1, pages=1, width=80)
    assert [tuple(look_up.shape) for look_up in looked] == [
        (4096, 512, 4, 128), (4096, 72, 100, 128), (16, 2, 100, 80)]  # fmt: skip


@compiles
def test_one_compiled_kernel_serves_any_number_of_keys_rows_and_splits():
    def constants(launch):
        return tuple(launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr)

    sizes = [(1, 17, 30), (1, 40, 300), (3, 90, 17), (64, 33, 300), (5, 1000, 1)]
    with pinned(paged_attention=Config(64)):
        recorded = [on_meta(B, rows, 32, 8, pages) for B, rows, pages in sizes]
    assert len({constants(launches[0]) for launches in recorded}) == 1
    assert len(recorded[3]) == 1, "where there are programs enough keys are not split, and nothing is merged"
    assert len(recorded[0]) == 2


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_keys_are_split_until_every_unit_is_busy_or_there_are_none_left(device):
    for keys in (16, 1024, 32768):
        for groups in (1, 8, 24, 2048):
            for rows in (1, 4, 1024):
                for config in (Config(), Config(64, 32, programs=8)):
                    shape = PagedShape(keys, groups, rows, 128)
                    count = paged.splits(config, shape, device)
                    tiles = groups * -(-rows // config.block_m)
                    assert count == power_of_2(count) <= paged.MAX_SPLITS
                    assert count * config.block_n < 2 * max(keys, config.block_n)
                    busy = tiles * count >= config.programs * device.units
                    assert busy or count == paged.MAX_SPLITS or count * config.block_n >= keys
                    assert count == 1 or tiles * count < 2 * config.programs * device.units + tiles


def test_predictions_know_the_bandwidth_and_that_a_program_alone_is_slow():
    for device in DEVICES.values():
        for shape in (PagedShape(8192, 8, 4, 128), PagedShape(4096, 512, 4, 128)):
            least = 2 * shape.keys * shape.groups * 128 * 2 / (device.bandwidth * 1e9)
            times = [PAGED.seconds(c, shape, torch.bfloat16, device)
                     for c in PAGED.choices(shape, torch.bfloat16, device)]  # fmt: skip
            assert min(times) > least
            assert PAGED.seconds(Config(stages=2), shape, torch.bfloat16, device) < 4 * least + 2e-5
    alone, split = Config(16, 128, programs=1), PagedShape(8192, 1, 4, 128)
    with pytest.MonkeyPatch.context() as patch:
        by_many = PAGED.seconds(alone, split, torch.bfloat16, DEVICES["h200"])
        patch.setattr(paged, "MAX_SPLITS", 1)
        assert PAGED.seconds(alone, split, torch.bfloat16, DEVICES["h200"]) > 2 * by_many


def test_queries_of_any_strides_and_layers_of_one_tensor():
    *tensors, rows, own = problem(SEGMENTS["after prefixes"] + [(1, 13)], side_by_side=True)
    q, k, v, *rest = tensors
    both = torch.stack([k, v], 2)  # [pages, page, 2, G, Dh]
    wide = torch.cat([q, q], 2)[:, :, : q.shape[2]]
    apart = torch.stack([k, v], 1)  # [pages, 2, page, G, Dh]: rows of neighbouring pages are not evenly spaced
    for k, v in ((both[:, :, 0], both[:, :, 1]), (apart[:, 0], apart[:, 1])):
        y = paged_attention(wide, k, v, *rest, rows=rows)
        assert relative_error(y.cpu(), in_order(q, tensors[3], tensors[5], own)) < 2e-6


def test_no_segment_at_all():
    q, k = torch.zeros(0, 4, 16, device=DEVICE), torch.zeros(2, PAGE, 2, 16, device=DEVICE)
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    cu_q = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert paged_attention(q, k, k, cu_q, none.view(0, 1), none).shape == (0, 4, 16)


@pytest.mark.skipif(INTERPRETED, reason="a graph is compiled")
def test_it_is_one_node_of_a_graph():
    *tensors, rows, _ = problem(SEGMENTS["a token of each"])
    call = torch.compile(lambda *x: paged_attention(*x, rows=1) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(call(*tensors), paged_attention(*tensors, rows=rows) + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: lambda q: q[:, :3]}, "heads is 3, expected a multiple of 2"),
        ({2: lambda v: v[:1]}, "v is"),
        ({1: lambda k: k.double(), 2: lambda v: v.double()}, "dtypes"),
    ],
)
def test_arguments_that_do_not_fit_are_told(change, message):
    *tensors, _, _ = problem(SEGMENTS["prompts"])
    for at, how in change.items():
        tensors[at] = how(tensors[at])
    with pytest.raises(ValueError, match=message):
        paged_attention(*tensors)


def test_it_counts_what_is_seen():
    cost = paged.cost([1, 3], [5, 4], heads=4, groups=2, width=16)
    assert cost.flops == 4 * (5 + 4 + 3 + 2) * 4 * 16
    assert cost.bytes == 2 * 16 * (2 * 2 * 9 + 2 * 4 * 4)


GPUS = ("a100", "h200", "b200", "rtx5090", "mi300x")


def check_code(launches, device, dtype=torch.bfloat16):
    for launch in launches:
        code = compile_launch(launch, DEVICES[device])
        assert code.spills <= (8 if dtype == torch.float32 else 0), code
        assert code.shared <= DEVICES[device].shared, code
        assert dtype == torch.float32 or launch.kernel is paged._merge_kernel or code.matrix, code


@compiles
@pytest.mark.parametrize("device", GPUS)
def test_its_code_fits_every_gpu(device):
    """Compile for one token of a document in MM1-3B, of many documents in a 7B, and a prompt after a cached prefix."""
    for sizes in ((1, 1, 24, 24), (64, 1, 32, 8), (4, 100, 32, 8)):
        check_code(on_meta(*sizes, device=device), device)


@compiles
@pytest.mark.parametrize("config", [Config(16, 128, 8, 2, 8), Config(32, 64, stages=2), Config(64, 64, 8, 2, 1)],
                         ids=lambda config: "-".join(map(str, vars(config).values())))  # fmt: skip
@pytest.mark.parametrize("device", mostly_slow("h200", *(gpu for gpu in GPUS if gpu != "h200")))
def test_other_configurations_have_code_that_fits_too(config, device):
    if not PAGED.legal(config, PagedShape(4096, 32, 400, 128), torch.bfloat16, DEVICES[device]):
        pytest.skip("is not legal there")
    with pinned(paged_attention=config):
        check_code(on_meta(4, 100, 32, 8, device=device)[:1], device)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("dtype, width", [(torch.float32, 128), (torch.float32, 256), (torch.bfloat16, 256),
                                          (torch.bfloat16, 80)])  # fmt: skip
@pytest.mark.parametrize("device", GPUS)
def test_the_default_has_code_that_fits_at_other_widths_and_in_fp32(device, dtype, width):
    for rows in (1, 100):
        check_code(on_meta(4, rows, 32, 8, width=width, dtype=dtype, device=device), device, dtype)


@pytest.mark.parametrize("config", [Config(16, 16, programs=1), Config(16, 16, programs=8)], ids=["whole", "split"])
@pytest.mark.parametrize("segments", ["a token of each", "some without"])
def test_rows_of_no_segment_are_zeros(segments, config, poisoned):
    q, *tensors, rows, _ = problem(SEGMENTS[segments])
    padded = torch.cat([q, torch.full((7, *q.shape[1:]), float("nan"), device=q.device)])
    with pinned(paged_attention=config):
        y = paged_attention(padded, *tensors, rows=rows)
        assert torch.equal(y[: len(q)], paged_attention(q, *tensors, rows=rows))
    assert not y[len(q) :].any()


def test_without_segments_all_rows_are_zeros(poisoned):
    q, k, v, cu_q, tables, lengths, _, _ = problem(SEGMENTS["prompts"])
    assert not paged_attention(q, k, v, cu_q[:1], tables[:0], lengths[:0]).any()


def test_integers_of_64_bits_and_meta_tensors_are_taken():
    q, k, v, *integers, rows, _ = problem(SEGMENTS["prompts"])
    y = paged_attention(q, k, v, *integers, rows=rows)
    assert torch.equal(y, paged_attention(q, k, v, *(x.long() for x in integers), rows=rows))
    assert paged_attention(*(x.to("meta") for x in (q, k, v, *integers)), rows=rows).shape == y.shape


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="a GPU is not waited for")
def test_more_rows_than_were_announced_are_refused():
    *tensors, rows, _ = problem(SEGMENTS["prompts"])
    with pytest.raises(
        ValueError, match=r"rows is 6, expected at least the largest of the segments' new rows, \[5, 1, 7\]"
    ):
        paged_attention(*tensors, rows=rows - 1)


@pytest.mark.parametrize(
    "place, change, told",
    [
        (1, lambda x: x.to("meta"), "v|device"),
        (3, lambda x: x.to("meta"), "device of cu_q is meta"),
        (3, lambda x: x[:-1], r"cu_q is \(3,\), expected \(4,\)"),
        (4, lambda x: x[0], "tables is"),
        (4, lambda x: x[:2], r"tables is \(2, 2\), expected \[3, M\]"),
        (5, lambda x: x.float(), "lengths is"),
        (0, lambda x: x.double(), "dtypes of q, k and v"),
        (0, lambda x: x[..., :8], "head width of k is 16, expected 8"),
    ],
)
def test_refuses_bad_arguments(place, change, told):
    *tensors, rows, _ = problem(SEGMENTS["prompts"])
    tensors[place] = change(tensors[place])
    with pytest.raises(ValueError, match=f"paged_attention: ({told})"):
        paged_attention(*tensors, rows=rows)


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="a GPU is not waited for")
@pytest.mark.parametrize(
    "name, change, told",
    [
        ("lengths", lambda x: x.fill_(9), r"lengths\[0\] is 9, expected at most 2 pages of 4 keys"),
        ("lengths", lambda x: x.fill_(-1), r"lengths\[0\] is -1"),
        ("tables", lambda x: x.fill_(99), r"tables\[0\] is \[99, 99\], expected pages of 0 … 7"),
        ("tables", lambda x: x.fill_(-1), r"tables\[0\] is \[-1, -1\]"),
        ("cu_q", lambda x: x.add_(3), "cu_q is .*, expected offsets that rise from 0 to at most the 13 rows"),
        ("cu_q", lambda x: x.copy_(x.flip(0)), "cu_q is"),
    ],
)
def test_places_that_are_not_there_are_refused(name, change, told):
    q, k, v, cu_q, tables, lengths, rows, _ = problem(SEGMENTS["prompts"])
    places = {"cu_q": cu_q, "tables": tables, "lengths": lengths}
    change(places[name])
    with pytest.raises(ValueError, match=f"paged_attention: {told}"):
        paged_attention(q, k, v, **places, rows=rows)


def test_rows_before_the_first_key_see_nothing():
    q, k, v, cu_q, tables, lengths, rows, own = problem([(5, 5), (3, 8)])
    y = paged_attention(q, k, v, cu_q, tables, lengths - torch.tensor([3, 0], device=DEVICE).int(), rows=rows)
    few = torch.cat([own[0][:, :2], own[1]], 1).double()
    truth = reference.attention(
        q.double().cpu(), *few, cu_q.cpu(), mask=Causal(), cu_seqlens_k=torch.tensor([0, 2, 10])
    )
    assert relative_error(y.cpu(), truth) < 1e-6
    assert not y[:3].any()


def test_segments_that_share_pages_may_have_fewer_keys_than_rows():
    q, k, v, cu_q, tables, lengths, rows, _ = problem([(5, 5), (5, 5)])
    tables, lengths = tables[:1].expand(2, -1), lengths - 3
    y = paged_attention(q, k, v, cu_q, tables, lengths, rows=rows)
    for b in range(2):
        alone = paged_attention(q[5 * b : 5 * b + 5], k, v, cu_q[:2], tables[:1], lengths[:1], rows=rows)
        assert relative_error(y[5 * b : 5 * b + 5], alone) < 1e-6
        assert not alone[:3].any()


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="of the CPU's path")
@pytest.mark.parametrize("piece", [PAGE, 3 * PAGE, 8192])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_cached_keys_are_seen_in_pieces(piece, side_by_side):
    """Segments have equal and unequal lengths, share pages or not, and end anywhere in a page."""
    segments = [(5, 45), (5, 45), (1, 37), (9, 30), (30, 31), (6, 6)]
    q, k, v, cu_q, tables, lengths, rows, own = problem(segments, side_by_side=side_by_side)
    for b in (1, 2):  # of the first as many pages as both have before their own rows
        tables[b, :8] = tables[0, :8]
        own[b][:, : 8 * PAGE] = own[0][:, : 8 * PAGE]
    y = paged.on_host(q, k, v, cu_q, tables, lengths, rows, piece)
    assert relative_error(y, in_order(q, cu_q, lengths, own)) < 5e-7


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="of the CPU's path")
def test_rows_after_cached_keys_allocate_no_tensor_of_all_pairs():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = result if isinstance(result, tuple) else (result,)
            self.numel = max([self.numel, *(x.numel() for x in tensors if isinstance(x, torch.Tensor))])
            return result

    *tensors, rows, _ = problem([(600, 1500)], heads=(2, 1), width=8)
    with Largest() as largest:
        paged.on_host(*tensors, rows)
    assert largest.numel <= max(x.numel() for x in tensors) < 600 * 600
