"""Define the command `mm1 demo`."""

from pathlib import Path


def demo(out: Path = Path("runs/demo")) -> None:
    """Train a small MM1 on the shipped handwritten digits, then caption and answer questions about unseen ones.

    Args:
        out: folder for checkpoints, metrics and the page of examples.
    """
    from mm1.engine.demo.digits import demo

    demo(out)
