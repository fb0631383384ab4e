"""torchvision beside a torch it was not built for.

transformers and timm import torchvision, whose wheels are built against CUDA. Beside a CPU build of torch its import
fails for want of two operators; declaring them is all it takes, as neither library calls them.
"""

import torch

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a library's operators live as long as it does


def declare_operators() -> None:
    """Where torch is a CPU build; before transformers or timm are imported."""
    if torch.version.cuda is None and torch.version.hip is None and not _declared:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in OPERATORS:
            library.define(schema)
        _declared.append(library)
