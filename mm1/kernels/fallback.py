"""Run an op in plain torch where its Triton kernels do not work, instead of ending the user's run.

An op falls back for tensors of the same dtypes on the same kind of GPU

- after one of its kernels failed to compile, to load or to launch in this process,
- if `mm1 doctor --gpu` found it wrong with the same GPU, versions of torch and Triton, and source of mm1/kernels.

It warns when it falls back first. MM1_STRICT=1 raises the error of the kernel instead, and ignores what `mm1 doctor`
found; so does a configuration that the caller pinned, because `mm1 tune` must see that it fails.

Four kinds of errors are raised as they are. Too little memory, as the plain op needs more. An error after which the
GPU fails every call of this process, such as an illegal memory access, which a synchronization shows. And an error
during the capture of a CUDA graph: the plain ops read sizes on the host, which ends a capture, so a step must run once
before it is captured, and without a graph if `plain_calls` rose in that run. And the error of a kernel for images of
which the batch lacks some patches: plain `patch_embed`, `conv_block` and `adaptive_pool` take whole images alone.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mm1.kernels.tuning import cache_folder, is_pinned

PLAIN: dict[str, Callable] = {}  # the implementation of each op in plain torch, which tests compare with the others


class KernelError(RuntimeError):
    """Raised by `dispatch.launch` where a kernel cannot run, and the op can be computed without it."""

    def __init__(self, kernel: str, error: BaseException):
        lines = str(error).strip().splitlines() or [""]
        super().__init__(f"{kernel}: {type(error).__name__}: {lines[-1 if lines[0].startswith('at ') else 0]}")


class Unsupported(ValueError):
    """Raised by an op in plain torch for input that its kernels alone take."""


class _State:
    """Hold what this process has found out; autograd calls ops in threads of its own, which must see it too."""

    # Why the kernels of (GPU, op, dtypes) are not used; None until the first op reads the file.
    failed: ClassVar[dict[tuple[str, str, str], str] | None] = None
    warned: ClassVar[set[tuple[str, str, str]]] = set()
    plain: ClassVar[frozenset[str] | None] = frozenset()  # ops that `plain_ops` names; None: all
    watch: ClassVar[Callable[[str, str], None] | None] = None
    calls = 0  # of plain implementations
    idle = False  # nothing failed, is to run in plain torch or is watched, so that ops run their bodies


def _update(**changes: Any) -> None:
    for name, value in changes.items():
        setattr(_State, name, value)
    _State.idle = _State.failed == {} and _State.plain == frozenset() and _State.watch is None


def is_strict() -> bool:
    """Return whether kernels that fail raise their errors."""
    return os.environ.get("MM1_STRICT", "0") == "1" or is_pinned()


def plain_calls() -> int:
    """Return how often this process has computed an op in plain torch instead of by its kernels."""
    return _State.calls


def recoverable(error: Exception, device: torch.device) -> bool:
    """Return whether an op whose launch raised `error` can be computed in plain torch; see the head of this file."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in str(error):
        return False
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return False
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True


def guarded(name: str, body: Callable, plain: Callable) -> Callable:
    """Return `body`, which launches the kernels of the op `name`, with `plain` in its place where they do not work.

    plain: computes the same results from the same arguments, of which the first tensor names the device, with torch.
    """
    PLAIN[name] = plain

    @wraps(body)
    def run(*arguments: Any) -> Any:
        failure: KernelError | None = None
        if _State.idle or not _runs_plain(name, arguments):
            try:
                return body(*arguments)
            except KernelError as error:
                failure, key = error, _key(name, arguments)
                _update(failed=_failed() | {key: str(error)})
                _warn(key)
        _State.calls += 1
        try:
            return plain(*arguments)
        except Unsupported:
            if failure:
                raise failure from failure.__cause__
            raise

    return run


def _runs_plain(name: str, arguments: tuple[Any, ...]) -> bool:
    if _State.watch:
        _State.watch(*_key(name, arguments)[1:])
    if _State.plain is None or name in _State.plain:
        return True
    if not _failed() or is_strict() or (key := _key(name, arguments)) not in _failed():
        return False
    _warn(key)
    return True


def _key(name: str, arguments: tuple[Any, ...]) -> tuple[str, str, str]:
    """Return GPU, op and dtypes: of the tensors and lists of tensors in the arguments that hold real numbers.

    The dtypes are "integers" if none does.
    """
    tensors = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
    return torch_name(tensors[0].device), name, "+".join(sorted(dtypes)) or "integers"


@cache
def torch_name(device: torch.device) -> str:
    """Return torch's name of a GPU, such as "NVIDIA H200"; "cpu" for a CPU, where kernels are interpreted."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _warn(key: tuple[str, str, str]) -> None:
    if key not in _State.warned:
        _State.warned.add(key)
        gpu, op, dtypes = key
        warnings.warn(
            f"mm1 computes {op} ({dtypes}) on {gpu} in plain torch, which is slower: {_failed()[key]}. "
            "Please report it on the project's issue page, with the output of `mm1 doctor --gpu`. MM1_STRICT=1 raises "
            "the error instead.",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip


@contextmanager
def plain_ops(*names: str) -> Iterator[None]:
    """Compute the ops of these names (none: all ops) in plain torch in the block, in all threads, as tests do."""
    before = _State.plain
    _update(plain=frozenset(names) if names else None)
    try:
        yield
    finally:
        _update(plain=before)


@contextmanager
def watching(callback: Callable[[str, str], None]) -> Iterator[None]:
    """Call callback(op, dtypes) before each op in the block, in all threads."""
    before = _State.watch
    _update(watch=callback)
    try:
        yield
    finally:
        _update(watch=before)


# ---- What `mm1 doctor --gpu` found: one file in the user's cache, read by the first op of a process ----


def memory() -> Path:
    """Return the file that lists the ops whose kernels were found wrong."""
    return cache_folder().parent / "plain-ops.json"


def remember(gpu: str, failed: dict[tuple[str, str], str], complete: bool = True) -> None:
    """Replace what the file says about this kind of GPU and these versions: why kernels of (op, dtypes) are not used.

    complete: whether every check ended; if not, what the file says about other ops remains. Raises OSError if the file
    cannot be written.
    """
    rows = [
        row for row in _rows()
        if (row["gpu"], row["versions"]) != (gpu, versions())
        or not (complete or (row["op"], row["dtypes"]) in failed)
    ]  # fmt: skip
    rows += [{"gpu": gpu, "versions": versions(), "op": o, "dtypes": d, "why": w} for (o, d), w in failed.items()]
    path = memory()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(part, path)
    _update(failed=None)


def remembered() -> dict[tuple[str, str, str], str]:
    """Return why the kernels of (GPU, op, dtypes) are not used, by the file's rows for this source and versions."""
    rows = _rows()
    here = versions() if rows else ""
    return {(r["gpu"], r["op"], r["dtypes"]): r["why"] for r in rows if r["versions"] == here}


def _failed() -> dict[tuple[str, str, str], str]:
    failed = _State.failed
    if failed is None:
        failed = remembered()
        _update(failed=failed)
    return failed


def _rows() -> list[dict[str, str]]:
    """Read the file; a missing or damaged one has no rows."""
    fields = {"gpu", "versions", "op", "dtypes", "why"}
    with suppress(OSError, ValueError, TypeError):
        rows = json.loads(memory().read_text())
        return [r for r in rows if isinstance(r, dict) and r.keys() == fields and {*map(type, r.values())} == {str}]
    return []


@cache
def versions() -> str:
    """Return the versions of torch and Triton, and a hash of all source in mm1/kernels: a change outdates the file.

    Triton's own hash of a kernel leaves out the code that launches it, which may be at fault as well.
    """
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    installed = []
    for package in ("triton", "triton-rocm"):
        with suppress(PackageNotFoundError):
            installed.append(f"{package} {version(package)}")
    return ", ".join([f"torch {torch.__version__}", *installed, f"kernels {source.hexdigest()[:16]}"])
