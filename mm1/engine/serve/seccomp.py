"""Install a seccomp filter that lets a process compute, allocate memory, use open files, and exit, to decode images.

The filter is an allow-list in classic BPF, installed with ctypes. System calls that libraries try but do not need fail
with EPERM. Any other call kills the process, x32 and 32-bit calls included.
Sources: Linux, Documentation/userspace-api/seccomp_filter.rst, include/uapi/linux/{seccomp,filter,audit,prctl}.h;
numbers from arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

import ctypes
import errno
import os
import platform
import struct

PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
SET_MODE_FILTER, FLAG_TSYNC = 1, 1
KILL, ERRNO, ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
MAP_ANONYMOUS, PROT_EXEC = 0x20, 4

# machine: AUDIT_ARCH, number of the system call seccomp, column in the tables below
MACHINES = {"x86_64": (0xC000_003E, 317, 0), "aarch64": (0xC000_00B7, 277, 1)}

# System call numbers on x86-64 and on aarch64; None where there is no such call.
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "munmap": (11, 215), "mremap": (25, 216), "brk": (12, 214),
    "madvise": (28, 233), "futex": (202, 98), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "getrandom": (318, 278), "sched_yield": (24, 124),
    "rt_sigreturn": (15, 139), "restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
MMAP, MPROTECT = (9, 222), (10, 226)  # allowed for memory that is neither a file nor executable
REFUSED = {
    "open": (2, None), "openat": (257, 56), "stat": (4, None), "lstat": (6, None), "fstat": (5, 80),
    "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17),
    "getdents64": (217, 61), "lseek": (8, 62), "ioctl": (16, 29), "fcntl": (72, 25), "writev": (20, 66),
    "getpid": (39, 172), "gettid": (186, 178), "prlimit64": (302, 261), "getrlimit": (97, 163),
    "sysinfo": (99, 179), "sched_getaffinity": (204, 123), "uname": (63, 160), "prctl": (157, 167),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "sigaltstack": (131, 132), "membarrier": (324, 283),
}  # fmt: skip


def install() -> None:
    """Irrevocably put all threads of this process under the filter. Raises OSError where that is not possible."""
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in MACHINES or struct.calcsize("P") != 8:
        raise OSError(f"seccomp needs 64-bit Linux on x86-64 or aarch64, found {platform.system()} on {machine}")
    lines = program(machine)
    instructions = ctypes.create_string_buffer(b"".join(lines))
    header = ctypes.create_string_buffer(struct.pack("HP", len(lines), ctypes.addressof(instructions)))
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (MACHINES[machine][1], SET_MODE_FILTER, FLAG_TSYNC)
    if failed := libc.syscall(*map(ctypes.c_long, arguments), header):
        number = ctypes.get_errno() if failed < 0 else errno.EBUSY  # above 0: the id of a thread that was not changed
        raise OSError(number, f"the seccomp filter was not installed: {os.strerror(number)}")


def prctl(option: int, value: int) -> None:
    """Call prctl(option, value, 0, 0, 0). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}): {os.strerror(ctypes.get_errno())}")


def program(machine: str) -> list[bytes]:
    """Return the filter of a machine as a list of struct sock_filter."""
    architecture, _, column = MACHINES[machine]
    refuse, allow = [_line(RETURN, ERRNO | errno.EPERM)], [_line(RETURN, ALLOW)]

    def each(table: dict[str, tuple[int | None, ...]], body: list[bytes]) -> list[bytes]:
        numbers = [row[column] for row in table.values()]
        return [line for number in numbers if number is not None for line in _if(EQUAL, number, body)]

    not_executable = [_load(2), *_if(ANY_BIT, PROT_EXEC, refuse), *allow]
    return [
        _line(LOAD, ARCHITECTURE),
        _line(EQUAL, architecture, 1, 0),
        _line(RETURN, KILL),
        _line(LOAD, NUMBER),
        *each(ALLOWED, allow),
        *_if(EQUAL, MMAP[column], [_load(3), *_if(ANY_BIT, MAP_ANONYMOUS, not_executable), *refuse]),
        *_if(EQUAL, MPROTECT[column], not_executable),
        *each(REFUSED, refuse),
        _line(RETURN, KILL),
    ]


def _line(code: int, value: int, skip_if_true: int = 0, skip_if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, skip_if_true, skip_if_false, value)


def _load(argument: int) -> bytes:
    """Return the line that loads the lower half of an argument; both architectures are little-endian."""
    return _line(LOAD, ARGUMENTS + 8 * argument)


def _if(test: int, value: int, body: list[bytes]) -> list[bytes]:
    return [_line(test, value, 0, len(body)), *body]
