"""Define the errors about a user's input, and the checks that raise them."""


class UserError(ValueError):
    """The user's settings, arguments or paths are wrong, as one line says. The command prints it and exits with 2."""


class Busy(RuntimeError):
    """A limit on requests is reached, and the client should try again later."""


class Unreadable(ValueError):
    """A record or an image cannot be used; a run skips it and counts it.

    reason: one line of at most 300 characters; shard, key: the file and the record's name in it.
    """

    def __init__(self, reason: str, shard: str = "", key: str = ""):
        super().__init__(reason, shard, key)  # unpickling in the parent process calls this with all arguments
        self.reason = " ".join(reason.split())[:300]
        self.shard, self.key = shard, key

    def __str__(self) -> str:
        return ": ".join(part for part in (self.shard, self.key, self.reason) if part)


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise UserError unless `condition` holds: "NAME is VALUE, expected EXPECTED"."""
    if not condition:
        raise UserError(f"{name} is {value!r}, expected {expected}")


def at_least(minimum: int, **settings: int | None) -> None:
    """Raise UserError for a setting that is below `minimum`; None is accepted."""
    for name, value in settings.items():
        require(value is None or value >= minimum, name, value, f"≥ {minimum}")
