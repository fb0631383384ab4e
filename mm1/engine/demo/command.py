"""Define the command `mm1 demo`."""

from pathlib import Path
from typing import Annotated, Literal

from mm1.engine.evaluation.config import UNSET


def demo(
    model: Literal["digits", "aim"] = "digits",
    /,
    out: Annotated[Path | None, UNSET] = None,
) -> None:
    """Train a small model on shipped images in minutes, and show what it has learned on images that it has not seen.

    Args:
        model: digits trains MM1 on handwritten digits, which then captions and answers questions; aim pre-trains an
            image encoder on clip art, and compares its features before and after.
        out: folder for checkpoints, metrics and the page of examples (default: runs/demo, and runs/demo-aim for aim).
    """
    if model == "digits":
        from mm1.engine.demo.digits import demo

        demo(out or Path("runs/demo"))
    else:
        from mm1.engine.demo.aim import demo

        demo(out or Path("runs/demo-aim"))
