"""What all ops share: the cost of one call, and the one way to refuse an argument."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What one call must do at least: floating-point operations, and bytes read plus written once."""

    flops: int
    bytes: int


def expect(condition: bool, op: str, argument: str, found: object, expected: object) -> None:
    """ValueError naming op, argument, what was found and what was expected, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{op}: {argument} is {found}, expected {expected}")
