"""The errors that are about the user's input, and the check that raises them."""


class UserError(ValueError):
    """The user's settings or paths are wrong. One clear line: the CLI prints it and exits with 2."""


class Unreadable(ValueError):
    """One record or image cannot be used: `reason` in one line, its shard and key there. A run skips and counts it."""

    def __init__(self, reason: str, shard: str = "", key: str = ""):
        super().__init__(reason, shard, key)  # all, or the exception would not survive the way back from a worker
        self.reason = " ".join(reason.split())[:300]
        self.shard, self.key = shard, key

    def __str__(self) -> str:
        return ": ".join(part for part in (self.shard, self.key, self.reason) if part)


def at_least(least: int, **settings: int | None) -> None:
    """Raise UserError for a setting below it."""
    for name, value in settings.items():
        if value is not None and value < least:
            raise UserError(f"{name} is {value}, expected ≥ {least}")
