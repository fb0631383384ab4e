"""Train a mixture-of-experts layer, and embed images of any size: python examples/kernels.py

Both run on a GPU if there is one.
"""

import torch
from torch import Tensor, nn

from mm1.kernels.abstractor import adaptive_pool
from mm1.kernels.moe import moe_mlp, route
from mm1.kernels.patches import Grids, patch_embed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Experts(nn.Module):
    """Compute a SwiGLU MLP of E experts, of which each token uses K."""

    def __init__(self, width: int, hidden: int, experts: int, k: int):
        super().__init__()
        self.k = k
        self.router = nn.Linear(width, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * hidden, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return [T, D] and the load-balance loss of the router."""
        routing = route(self.router(x), self.k)
        return moe_mlp(x, routing.index, routing.weight, self.gate_up, self.down), routing.load_balance


def train_experts(steps: int = 60) -> list[float]:
    """Fit the experts to a random function, and return the loss of each step."""
    torch.manual_seed(0)
    layer = Experts(width=32, hidden=48, experts=8, k=2).to(DEVICE)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).to(DEVICE)
    x = torch.randn(512, 32, device=DEVICE)
    y = teacher(x).detach()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        out, load_balance = layer(x)
        loss = (out - y).square().mean()
        (loss + 0.01 * load_balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def embed_images(sizes: list[tuple[int, int]], patch: int = 14, width: int = 64) -> Tensor:
    """Embed random images of these sizes in patches, pool each to 4 x 4 tokens, and return [images * 16, width]."""
    grids = Grids(sizes, device=DEVICE)
    pixels = torch.randint(0, 256, (sum(h * w for h, w in sizes) * patch**2, 3), dtype=torch.uint8, device=DEVICE)
    weight = torch.randn(width, 3 * patch**2, device=DEVICE) * 0.02
    table = torch.randn(24, 24, width, device=DEVICE) * 0.02  # positions, resampled to each image's grid
    tokens, _ = patch_embed(pixels, grids, weight, None, table, patch_size=patch, mean=(0.5,) * 3, std=(0.25,) * 3)
    return adaptive_pool(tokens, grids, (4, 4))


if __name__ == "__main__":
    losses = train_experts()
    print(f"experts: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"images: {tuple(embed_images([(27, 27), (48, 20), (1, 64)]).shape)}")
