"""Kernels are compiled ahead of time, and found by C tables; native/tests checks the library itself."""

import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import not_interpreted

from mm1.autotune import ahead
from mm1.kernels.device import DEVICES
from mm1.kernels.tiles import Config

pytestmark = not_interpreted
BF16 = torch.bfloat16
ROW = {"bits": 16, "rows": [513, 1024], "experts": 64, "k": 2048, "n": 1408, "gated": False}
CONFIG = {"block_m": 64, "block_n": 128, "block_k": 64, "group_m": 8, "warps": 4, "stages": 4, "tma": True,
          "persistent": True}  # fmt: skip


@pytest.fixture(scope="module")
def plan():
    return ahead.plan(["80", "90"], 4)


def one(launches, kernel):
    return next(launch for launch in launches if launch.name == kernel)


def test_every_kernel_of_every_target_and_dtype_is_planned(plan):
    jobs, variants, rows = plan
    for target in (0, 80, 90):
        kernels = {job.kernel for job in jobs if job.target == target}
        assert kernels == set(ahead.KERNELS)
        for dtype in range(3):
            ops = {v["op"] for r in rows if (v := variants[r["variant"]])["arch"] == target and v["dtype"] == dtype}
            assert ops == set(ahead.OPS)
    used = {job.variant for job in jobs} - {-1}
    assert used == set(range(len(variants))) == {row["variant"] for row in rows}


def test_the_last_row_holds_for_every_size(plan):
    _, variants, rows = plan
    for target in (0, 80, 90):
        for op in ("grouped_gemm", "experts_up", "patch_embed"):
            mine = [r["when"] for r in rows if (v := variants[r["variant"]])["arch"] == target and v["op"] == op]
            assert mine[-1] == {}, (target, op)


def test_no_configuration_needs_descriptors_or_few_programs(plan):
    _, variants, _ = plan
    for variant in variants:
        assert not variant["config"].get("tma")
        assert not variant["config"].get("persistent")


def table(*rows):
    return {"rows": [{"when": when, "config": {**CONFIG, **config}} for when, config in rows]}


def test_rows_of_a_table_that_hold_here_are_taken_by_pointers():
    op = ahead.OPS["grouped_gemm"]
    rows = table((ROW, {}), ({**ROW, "bits": 32}, {}), ({**ROW, "gated": True}, {}), ({**ROW, "other": 3}, {}))
    ((when, config),) = ahead.table_rows(op, rows, 16, 4)
    assert when == {"rows": (513, 1024), "experts": (64, 64), "k": (2048, 2048), "n": (1408, 1408)}
    assert vars(config) == {**CONFIG, "tma": False, "persistent": False}


def test_the_configurations_most_used_are_kept_in_the_order_of_the_table():
    op = ahead.OPS["grouped_gemm"]
    warps = (4, 8, 2, 8, 4, 8)
    rows = table(*(({**ROW, "rows": [i, i]}, {"warps": w}) for i, w in enumerate(warps)))
    kept = ahead.table_rows(op, rows, 16, 2)
    assert [(when["rows"][0], config.warps) for when, config in kept] == [(0, 4), (1, 8), (3, 8), (4, 4), (5, 8)]


def test_a_table_comes_before_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "TABLES", tmp_path)
    h200 = ahead.targets(["90"])[0]
    alone = ahead.rows_of("grouped_gemm", h200, BF16, 4)
    (tmp_path / "grouped_gemm").mkdir()
    (tmp_path / "grouped_gemm" / "h200.json").write_text(json.dumps(table((ROW, {}))))
    first, *rest = ahead.rows_of("grouped_gemm", h200, BF16, 4)
    assert first[0]["rows"] == (513, 1024)
    assert rest == alone
    assert ahead.rows_of("grouped_gemm", h200, torch.float32, 4)[0][0] != first[0]


def test_a_pooled_row_is_compiled_for_each_width_it_allows():
    op = ahead.OPS["adaptive_pool"]
    for (low, high), widths in {(1, 1024): {1024}, (1025, 1025): {2048}, (1000, 5000): {1024, 2048, 4096}}.items():
        calls = list(ahead.calls_of(op, {"channels": (low, high)}))
        assert {dims[1] for _, dims in calls} == widths
        assert {out for out, _ in calls} == set(ahead.PLACES)
    assert {dims[1] for _, dims in ahead.calls_of(op, {})} == {1024, 2048, 4096}


def test_an_embedding_row_is_compiled_for_the_patches_it_allows():
    op = ahead.OPS["patch_embed"]
    assert {option[0] for option, _ in ahead.calls_of(op, {"k": (588, 588)})} == {14}
    assert {option[0] for option, _ in ahead.calls_of(op, {})} == {14, 16}


def test_code_for_older_gpus_fits_the_least_shared_memory():
    for op in ahead.OPS:
        last = ahead.rows_of(op, ahead.targets(["80"])[1], BF16, 4)[-1][1]
        assert last in [config for _, config in ahead.rows_of(op, ahead.targets(["80"])[0], BF16, 4)]


def test_only_what_holds_for_every_size_is_compiled_in():
    pinned = {"grouped_gemm": Config(tma=False)}
    gemm = ahead.recorded(DEVICES["h200"], lambda: ahead._gemm(BF16, (1024, 16, 2048, 1024), True), **pinned)
    signature, constants, attributes = ahead.general(one(gemm, "_gemm_kernel"))
    names = one(gemm, "_gemm_kernel").kernel.arg_names
    divisible = {names[i] for (i,) in attributes}
    assert {"a", "y_ptr", "K", "N", "stride_am"} <= divisible
    assert not {"E", "num_m"} & divisible
    assert constants[names.index("stride_bk"),] == 1
    map_ = one(gemm, "_map_kernel")
    assert not {"M", "E", "num_m"} & {map_.kernel.arg_names[i] for (i,) in ahead.general(map_)[2]}

    embed = ahead.recorded(DEVICES["h200"], lambda: ahead._embed(BF16, (64, 0, 1024), (16, False, True)))
    fold = one(embed, "_fold_kernel")
    signature, _, attributes = ahead.general(fold)
    assert {signature[f"{name}{c}"] for name in ("scale", "shift") for c in range(3)} == {"fp32"}
    assert not {"K", "stride_n"} & {fold.kernel.arg_names[i] for (i,) in attributes}
    signature = ahead.general(one(embed, "_embed_kernel"))[0]
    assert signature["Gh"] == signature["Gw"] == "i32", "1 where there is no table"


def test_two_images_of_one_key_are_refused(monkeypatch):
    monkeypatch.setitem(ahead.KEYS, "_gemm_kernel", lambda v: (0, 0, 0))
    with pytest.raises(ValueError, match="gives two different images one key"):
        ahead.plan(["90"], 4)


def pool_job(target):
    device = DEVICES["h200"] if target else ahead.SMALL
    launches = ahead.recorded(device, lambda: ahead._pool(BF16, (4001, 1024), (8, 8)))
    return ahead.Job(target, "_pool_kernel", 1, 0, (8, 8, 1024)), launches[0], device


def test_an_image_is_machine_code_or_ptx(tmp_path):
    facts = ahead.compile_image(*pool_job(90), tmp_path / "a")
    assert (tmp_path / "a").read_bytes().startswith(b"\x7fELF")
    assert facts["args"] == ["x_ptr", "table_ptr", "y_ptr", "C"]
    assert facts["symbol"] == "_pool_kernel"
    ahead.compile_image(*pool_job(ahead.PTX), tmp_path / "b")
    assert ".target sm_80" in (tmp_path / "b").read_text()


@pytest.mark.parametrize("change", [{"global_scratch_size": 8}, {"profile_scratch_size": 8}, {"num_ctas": 2},
                                    {"launch_cooperative_grid": True}, {"launch_pdl": True}])  # fmt: skip
def test_what_the_library_cannot_launch_is_refused(change, tmp_path, monkeypatch):
    facts = {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1, "launch_cooperative_grid": False,
             "launch_pdl": False, "name": "k", "shared": 0, "num_warps": 4}  # fmt: skip
    fake = lambda *_: SimpleNamespace(metadata=SimpleNamespace(**facts | change), asm={"cubin": b""})  # noqa: E731
    monkeypatch.setattr(ahead.triton, "compile", fake)
    with pytest.raises(ValueError, match="needs scratch"):
        ahead.compile_image(*pool_job(90), tmp_path / "a")


def variant(op, arch=90, dtype=1):
    return {"op": op, "arch": arch, "dtype": dtype, "config": {"block_m": 64, "block_n": 32}}


def test_a_variant_too_large_for_its_gpu_is_left_out():
    variants = [variant("grouped_gemm"), variant("grouped_gemm")]
    rows = [{"when": {}, "variant": 0}, {"when": {}, "variant": 1}]
    images = [{"variant": 0, "shared": 300}, {"variant": 1, "shared": 100}, {"variant": 1, "shared": 50}]
    ahead.fitting(images, variants, rows, {90: 200})
    assert rows == [{"when": {}, "variant": 1}]
    assert [v["shared"] for v in variants] == [300, 100]
    with pytest.raises(ValueError, match="nothing fits"):
        ahead.fitting(images, variants, rows, {90: 60})


PROGRAM = """
struct image {
    const unsigned char *code; const char *symbol; const unsigned char *args; unsigned char count, dtype;
    short variant, key[3], warps; int shared;
};
struct variant { int block_m, block_n, shared; };
struct choice { int low[5], high[5], variant; };
#include "table.h"
const unsigned char mm1_image_0[1], mm1_image_1[1];
int main(void)
{
    const int gemm = 1, pool = 3 * DTYPES + 1; /* groups of bf16 */
    return !(archs[0] == 90 && image_begin[KERNEL_gemm] == 0 && image_begin[KERNEL_map] == 1 &&
             image_begin[KERNELS] == 2 && images[1].code == mm1_image_1 && images[0].args[1] == ARG_b &&
             choice_begin[gemm] == 0 && choice_begin[gemm + 1] == 1 && choice_begin[pool] == 1 &&
             choice_begin[pool + 1] == 2 && choices[0].low[2] == 5 && choices[0].high[2] == 6 &&
             choices[0].low[0] == 0 && choices[0].variant == 1 && variants[1].shared == 7 &&
             choices[1].high[1] == 9);
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_tables_are_c_with_groups_in_order(tmp_path):
    variants = [{**variant("adaptive_pool"), "shared": 0}, {**variant("grouped_gemm"), "shared": 7}]
    rows = [{"when": {"channels": (0, 9)}, "variant": 0}, {"when": {"k": (5, 6)}, "variant": 1}]
    image = {"symbol": "k", "args": ["a", "b"], "dtype": 1, "variant": 1, "key": (0, 0, 0), "warps": 4, "shared": 7}
    images = [{**image, "target": 90, "kernel": "_gemm_kernel"}, {**image, "target": 90, "kernel": "_map_kernel"}]
    (tmp_path / "table.h").write_text(ahead.tables(images, variants, rows, [90]))
    (tmp_path / "t.c").write_text(PROGRAM)
    subprocess.run(["cc", "-Wall", "-Werror", "-Wno-unused", tmp_path / "t.c", "-o", tmp_path / "t"], check=True)
    subprocess.run([tmp_path / "t"], check=True)
