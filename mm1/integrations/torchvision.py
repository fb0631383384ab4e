"""Make torchvision importable with a CPU build of torch.

transformers and timm import torchvision, whose wheels are built for CUDA. With a CPU build of torch the import fails,
because two operators are missing. Declaring them is enough, because neither library calls them.
"""

import torch

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # keeps the library alive, and so its operators


def declare_operators() -> None:
    """Declare torchvision's operators if torch is a CPU build. Call it before importing transformers or timm."""
    if torch.version.cuda is None and torch.version.hip is None and not _declared:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in OPERATORS:
            library.define(schema)
        _declared.append(library)
