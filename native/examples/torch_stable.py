"""Check libmm1's operator in torch: `torch_stable.py schema|run libmm1_torch.so`.

Without a GPU `run` ends with exit status 77.
"""

import sys

import torch

torch.ops.load_library(sys.argv[2])
op = torch.ops.libmm1.grouped_gemm
if sys.argv[1] == "schema":
    schema = str(op.default._schema)
    assert schema == "libmm1::grouped_gemm(Tensor a, Tensor b, Tensor offsets) -> Tensor", schema
    sys.exit()
if not torch.cuda.is_available():
    sys.exit(77)
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    a = torch.randint(-5, 6, (200, 64), device="cuda").to(dtype)
    b = torch.randint(-6, 7, (4, 64, 48), device="cuda").to(dtype)
    offsets = torch.tensor([30, 30, 170, 190], dtype=torch.int32, device="cuda")
    y = op(a, b, offsets)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        truth = (a[start:end].double() @ b[expert].double()).to(dtype)
        assert y[start:end].equal(truth), (dtype, expert)
        start = end
    assert not y[start:].any(), dtype
