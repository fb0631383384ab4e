"""Attacks from inside of a process that decodes images. Run: python sandbox_attacks.py FOLDER UID.

Each attack runs in a fork of its own, once as it is and once behind confine. The last line of standard output is one
JSON object: attack -> [outcome without, outcome with]: "killed" by the filter, "refused" with EPERM, or "succeeded".
"""

import ctypes
import errno
import json
import mmap
import os
import platform
import resource
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

from mm1.engine.serve import images, privacy, seccomp

libc = ctypes.CDLL(None, use_errno=True)
PARENT = os.getpid()
SECRET = ctypes.create_string_buffer(b"a secret of the parent")
FORKS = 0x11  # SIGCHLD: clone as fork does it
NOTHING = ctypes.create_string_buffer(256)
TCP = socket.AF_INET, socket.SOCK_STREAM


class Refused(Exception):
    pass


def called(name, *arguments):
    """Call a function of the C library; -1 with EPERM is a refusal, with another error the call got through."""
    ctypes.set_errno(0)
    found = getattr(libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if ctypes.c_int(found).value == -1 and ctypes.get_errno() == errno.EPERM:
        raise Refused
    if ctypes.c_int(found).value == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def system_call(number, *arguments):
    return called("syscall", number, *arguments)


def vector(address, size):
    return (ctypes.c_void_p * 2)(address, size)


def attacks(folder: Path, descriptor: int, tcp: socket.socket, listener: socket.socket) -> dict:
    name = str(folder / "kept").encode()
    other = str(folder / f"other-{os.getpid()}").encode()
    memory = vector(ctypes.addressof(NOTHING), 8), 1, vector(ctypes.addressof(SECRET), 8), 1, 0
    environment = f"/proc/{PARENT}/environ".encode()
    limit = resource.RLIMIT_AS, struct_of(-1, -1)
    return {
        "open": lambda: called("open", name, os.O_RDONLY),
        "open to write": lambda: called("open", other, os.O_WRONLY | os.O_CREAT, 0o600),
        "openat": lambda: called("openat", -100, name, os.O_RDONLY),
        "openat2": lambda: system_call(437, -100, name, struct_of(0, 0, 0), 24),
        "environ of the parent": lambda: called("open", environment, os.O_RDONLY),
        "memory of the parent": lambda: called("open", f"/proc/{PARENT}/mem".encode(), os.O_RDWR),
        "list a folder": lambda: os.listdir(folder),
        "socket": lambda: called("socket", *TCP, 0),
        "unix socket": lambda: called("socketpair", socket.AF_UNIX, socket.SOCK_STREAM, 0, NOTHING),
        "connect": lambda: tcp.connect(listener.getsockname()),
        "bind": lambda: tcp.bind(("127.0.0.1", 0)),
        "process_vm_readv": lambda: called("process_vm_readv", PARENT, *memory),
        "process_vm_writev": lambda: called("process_vm_writev", PARENT, *memory),
        "ptrace": lambda: called("ptrace", 0x4206, PARENT, 0, 0),  # PTRACE_SEIZE
        "kill": lambda: called("kill", PARENT, 0),
        "kill all": lambda: called("kill", -1, 0),
        "tgkill": lambda: called("tgkill", PARENT, PARENT, 0),
        "pidfd_open": lambda: system_call(434, PARENT, 0),
        "unlink": lambda: called("unlink", name),
        "rename": lambda: called("rename", name, other),
        "symlink": lambda: called("symlink", name, other),
        "link": lambda: called("link", name, other),
        "mkdir": lambda: called("mkdir", other, 0o700),
        "chmod": lambda: called("chmod", name, 0o777),
        "truncate": lambda: called("truncate", name, 0),
        "chdir": lambda: called("chdir", b"/"),
        "execve": lambda: os.execve("/bin/sh", ["sh", "-c", "exit 0"], {}),
        "fork": lambda: os.fork() or os._exit(0),
        "vfork": lambda: called("posix_spawn", NOTHING, b"/bin/true", None, None, vector(None, 0), vector(None, 0)),
        "clone": lambda: ends_at_once(libc.syscall(*CLONE)),
        "clone3": lambda: ends_at_once(system_call(435, struct_of(0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64)),
        "thread": lambda: threading.Thread(target=int).start(),
        "io_uring_setup": lambda: system_call(425, 4, NOTHING),
        "mount": lambda: called("mount", b"none", name, b"tmpfs", 0, None),
        "unshare": lambda: called("unshare", 0x1000_0000),
        "chroot": lambda: called("chroot", b"/"),
        "memfd_create": lambda: called("memfd_create", b"x", 0),
        "prctl": lambda: called("prctl", 3, 0, 0, 0, 0),
        "a filter of its own": lambda: called("prctl", 22, 2, 0, 0, 0),
        "personality": lambda: called("personality", 0xFFFF_FFFF),
        "mmap of a file": lambda: called("mmap", None, 4096, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, 0),
        "memory to execute": lambda: called("mmap", None, 4096, mmap.PROT_EXEC, 0x22, -1, 0),
        "mprotect to execute": lambda: called("mprotect", page_of(NOTHING), mmap.PAGESIZE, 7),
        "ioctl TIOCSTI": lambda: called("ioctl", 0, 0x5412, b"x"),
        "ioctl FIONREAD": lambda: called("ioctl", 0, 0x541B, NOTHING),
        "setrlimit": lambda: called("setrlimit", *limit),
        "prlimit": lambda: called("prlimit", PARENT, *limit, None),
        "setuid": lambda: called("setuid", 0),
        "dup": lambda: called("dup", 0),
        "pipe": lambda: called("pipe", NOTHING),
        "sendto": lambda: called("sendto", descriptor, b"x", 1, 0, None, 0),
        "shmget": lambda: called("shmget", 0, 4096, 0o1600),
        "alarm": lambda: signal.alarm(0),
        "ignore SIGALRM": lambda: called("signal", signal.SIGALRM, 1),
        "block SIGALRM": lambda: called("sigprocmask", 0, ctypes.create_string_buffer(b"\xff" * 128), None),
        "setsid": lambda: called("setsid"),
        "setpriority": lambda: called("setpriority", 0, 0, 5),
        "sched_setaffinity": lambda: called("sched_setaffinity", 0, 8, b"\1" + bytes(7)),
        "syslog": lambda: called("klogctl", 3, NOTHING, 8),
        "nanosleep": lambda: called("nanosleep", struct_of(0, 1), None),
        **({"x32": lambda: system_call(0x4000_0000 + 39)} if platform.machine() == "x86_64" else {}),
    }  # fmt: skip


CLONE = (56 if platform.machine() == "x86_64" else 220, FORKS, 0, 0, 0, 0)


def struct_of(*words):
    return (ctypes.c_long * len(words))(*words)


def page_of(buffer):
    return ctypes.addressof(buffer) & -mmap.PAGESIZE


def ends_at_once(process):
    """The child of a raw fork, which shares nothing with Python's own, ends; its parent goes on."""
    if not process:
        os._exit(0)
    if process == -1 and ctypes.get_errno() == errno.EPERM:
        raise Refused


def outcome(folder, attack: str, confined: bool) -> str:
    (folder / "kept").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as tcp, open(folder / "kept") as file:
        ours, theirs = os.pipe()
        if not (child := os.fork()):
            os.dup2(theirs, 1)  # its pipe and what it could abuse stay open, more than a decoder has
            said = b"succeeded"
            try:
                if confined:
                    images.confine(1 << 20)
                attacks(folder, file.fileno(), tcp, listener)[attack]()
            except (Refused, PermissionError) as error:
                said = b"refused" if getattr(error, "errno", errno.EPERM) == errno.EPERM else b"succeeded"
            except BaseException as error:
                said = f"{type(error).__name__}: {error}".encode()
            os.write(1, said)
            os._exit(0)
        os.close(theirs)
        said = os.read(ours, 1000).decode()
        os.close(ours)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGSYS:
        return "killed"
    return said or ("succeeded" if status == 0 else f"ended with status {status}")


def read_by_another(process: int) -> bool:
    """Say if another process of this user can read the environment or the memory of one."""
    if not (child := os.fork()):
        for name in ("environ", "mem"):
            with suppress(PermissionError), open(f"/proc/{process}/{name}", "rb"):
                os._exit(1)
        os._exit(0)
    return bool(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    folder, user = Path(sys.argv[1]), int(sys.argv[2])
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    seccomp.prctl(seccomp.PR_SET_DUMPABLE, 1)  # as it is for who began as this user
    names = list(attacks(folder, 0, socket.socket(), socket.socket()))
    found = {name: [outcome(folder, name, confined) for confined in (False, True)] for name in names}
    before = read_by_another(os.getpid())
    privacy.forbid_inspection()
    print(json.dumps({"attacks": found, "inspected": [before, read_by_another(os.getpid())]}))
