"""Make up records, for tests of the page and the tables that are made from records."""

import json


def spread(median, n=9):
    return {"median": median, "low": 0.99 * median, "high": 1.02 * median, "n": n}


def kernels(op="moe_mlp", case="coarse T=16", what="forward", ours=1.231e-3, peers=None, noise=0.02, **more):
    """Return a row of an op. peers: times relative to mm1's."""
    variants = {"mm1": {**spread(ours), "error": 1e-6}, "mm1 again": spread(ours)}
    for name, ratio in (peers or {"torch": 2.5}).items():
        variants[name] = {**spread(ours * ratio), "ratio": spread(ratio)}
    return {"bench": "kernels", "op": op, "case": case, "shape": {"tokens": 16}, "dtype": "fp32", "what": what,
            "mode": "host", "flops": 7_000_000, "bytes": 350_000, "noise": noise, "variants": variants, "failed": {},
            **more}  # fmt: skip


def train():
    rungs = {"plain": (0.8, "all eager"), "packed": (0.5, "documents end to end")}
    variants = {name: {**spread(t), "tokens_per_s": 4096 / t, "mfu": 0.1 / t, "hfu": 0.12 / t, "change": change,
                       "ratio": spread(t / 0.8)} for name, (t, change) in rungs.items()}  # fmt: skip
    variants["transformers"] = {**spread(0.9), "tokens_per_s": 4096 / 0.9, "about": "the same model there"}
    return {"bench": "train", "model": "mm1-1b", "case": "captions; 4096 tokens", "dtype": "bf16", "what": "step",
            "mode": "stream", "ledger": {"head": 6e9, "useful": 8e9, "padding": 1e9, "recompute": 1e9},
            "variants": variants, "failed": {"compiled": "RuntimeError: too many graphs"}}  # fmt: skip


def generate(batch=8, what="decode", ratio=1.5):
    ours = {**spread(0.004 * batch), "tokens_per_s": 250.0, "bandwidth_share": 0.6104 / batch}
    peer = {**spread(0.004 * batch * ratio), "ratio": spread(ratio)}
    return {"bench": "generate", "model": "mm1-1b", "case": f"4-shot batch={batch}", "what": what, "dtype": "bf16",
            "mode": "stream", "shape": {"batch": batch, "prompt": 700}, "noise": 0.01,
            "variants": {"mm1": ours, "transformers": peer}, "failed": {}}  # fmt: skip


def write(path, rows, date="2026-01-02", commit="0123456789abcdef", machine="box", **header):
    header = {"date": date, "commit": commit, "machine": machine, "device": "A Box", "versions": {"torch": "2.11"},
              **header}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": header, "rows": rows}))
    return path
