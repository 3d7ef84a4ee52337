"""What a process that runs jobs may no longer do, whatever runs in it.

No code of users is executed here; this is for the day on which a tensor library has a hole. In force after `confine`,
for the process and each of its threads, and for good:

- no new privileges: no program that it starts could gain any; and of the system administrator's, if it has them, only
  the one to read files;
- a filter of system calls (seccomp): no sockets or connections but the one it has, no other program, no other process,
  no signal to another process and no look into one, no file opened for writing, made, renamed or removed, no mounts,
  namespaces, kernel modules, keys, shared memory, io_uring. Such a call fails with `EPERM`. Results go to a file that
  the front end has opened;
- where the kernel has Landlock, no file is read but beneath the folders that are named: not the keys, not other jobs;
- no core files, and few open files.

Linux alone has these, on x86-64 and aarch64.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

from nnsight_compiler.service.engine import EngineError

OPEN_FILES = 4096

_NO_NEW_PRIVILEGES, _SET_DEATH_SIGNAL = 38, 1  # of prctl
_FILL = -6  # of mallopt
_SECCOMP_SET_FILTER, _EVERY_THREAD = 1, 1
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets of what the filter sees
_CLONE_THREAD = 0x10000
_OTHER_NUMBERS = 0x40000000  # x32, the third set of system calls of x86-64
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""The column of the tables below, and how the filter is told of the machine."""

_SECCOMP = (317, 277)
_CAPABILITIES = ((125, 90), (126, 91))  # capget, capset
_CAPABILITIES_VERSION, _READ_FILES = 0x20080522, 1 << 2
_CLONE = (56, 220)
_ABSENT = {"clone3": (435, 435)}
"""Fail as on a kernel without them: the C library then uses `clone`, whose flags the filter can see."""

_OPEN = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
"""With the number of the argument that has the flags."""

_SIGNAL = {"kill": (62, 129), "tgkill": (234, 131)}
"""May go to the process itself, which aborts so."""

_DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242),
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "perf_event_open": (298, 241), "bpf": (321, 280), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "openat2": (437, 437), "creat": (85, None), "truncate": (76, 45), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "unlink": (87, None), "unlinkat": (263, 35),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "mknod": (133, None), "mknodat": (259, 33),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "mq_unlink": (241, 181),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
}  # fmt: skip
"""Numbers on x86-64 and on aarch64, which has no `fork`, `rename` and the like."""

_LANDLOCK = (444, 445, 446)  # create_ruleset, add_rule, restrict_self
_LANDLOCK_VERSION = 1  # flag
_READS = 0b1100  # read files, list folders
_HANDLED = (
    0,
    0x1FFF,
    0x3FFF,
    0x7FFF,
)  # all that each version knows of files; those after the third know no more that matters


def confine(readable: Sequence[Path]) -> tuple[str, ...]:
    """Gives up for good all that is said above, in this process, which may read beneath these folders.

    Returns:
        what is in force, in words.

    Raises:
        EngineError: the kernel refuses.
    """
    column, machine = _machine()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    _ask("no new privileges", _libc().prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _drop_capabilities(column)
    landlock = _restrict_files(readable)
    instructions = b"".join(_filter(column, machine, os.getpid()))
    code = ctypes.create_string_buffer(instructions, len(instructions))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(instructions) // 8, ctypes.addressof(code)))
    _ask("seccomp", _libc().syscall(_SECCOMP[column], _SECCOMP_SET_FILTER, _EVERY_THREAD, program))
    return ("no new privileges", "seccomp", *(("landlock",) if landlock else ()))


def require() -> None:
    """Refuses a system that has no such sandbox.

    Raises:
        EngineError: it has none.
    """
    _machine()


def blank_memory() -> None:
    """Has memory that this process frees filled, and what it allocates come as zeros: `torch.empty` would show what an
    earlier job had there. Where the C library has no such setting, it does."""
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_FILL, 0xFF)  # what is allocated is filled with the complement


def die_with_parent(parent: int) -> None:
    """Has this process killed when its parent, whose number is given, ends; at once, where it has ended already."""
    _ask("a signal at the parent's death", _libc().prctl(_SET_DEATH_SIGNAL, 9, 0, 0, 0))
    if os.getppid() != parent:
        os._exit(1)


def readable() -> tuple[Path, ...]:
    """The folders and archives that Python and its libraries read from while they run."""
    own = (sys.prefix, sys.base_prefix, *(path for path in sys.path if path))
    system = ("/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev")
    return tuple(dict.fromkeys(Path(path).resolve() for path in (*system, *own)))


def exposed(folder: Path) -> Path | None:
    """The folder that libraries are read from in which this one lies, so that it can be read too; `None`: it cannot."""
    return next((each for each in readable() if folder.resolve().is_relative_to(each)), None)


@final
class _RefusalError(EngineError):
    """The kernel refuses a part of the sandbox."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(
            f"the workers' sandbox needs {what}, which is not to be had here ({reason}); "
            "serve without a sandbox if all who have keys are trusted"
        )


def _machine() -> tuple[int, int]:
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise _RefusalError("Linux on x86-64 or aarch64", f"{sys.platform} on {platform.machine()}")
    return _MACHINES[platform.machine()]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _ask(what: str, answer: int) -> int:
    if answer < 0:
        raise _RefusalError(what, os.strerror(ctypes.get_errno()))
    return answer


def _drop_capabilities(column: int) -> None:
    get, set_ = (numbers[column] for numbers in _CAPABILITIES)
    header = struct.pack("=Ii", _CAPABILITIES_VERSION, 0)
    held = ctypes.create_string_buffer(24)
    _ask("its capabilities", _libc().syscall(get, header, held))
    kept = struct.unpack_from("=I", held, 4)[0] & _READ_FILES  # the first of the permitted
    _ask("fewer capabilities", _libc().syscall(set_, header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)))


def _filter(column: int, machine: int, process: int) -> Iterator[bytes]:
    """The filter's program: each test jumps over its answer where it does not hold."""
    fail = _FAIL | errno.EPERM
    yield from (_step(_LOAD, _ARCHITECTURE), _step(_EQUAL, machine, 1, 0), _step(_RETURN, _KILL), _step(_LOAD, _NUMBER))
    if column == 0:
        yield from (_step(_AT_LEAST, _OTHER_NUMBERS, 0, 1), _step(_RETURN, fail))
    for numbers in _DENIED.values():
        yield from _unless(numbers[column], _step(_RETURN, fail))
    for numbers in _ABSENT.values():
        yield from _unless(numbers[column], _step(_RETURN, _FAIL | errno.ENOSYS))
    refuse_or_allow = (_step(_RETURN, fail), _step(_RETURN, _ALLOW))
    for numbers, argument in _OPEN.values():
        flags = (_step(_LOAD, _ARGUMENTS + 8 * argument), _step(_ANY_BIT, _WRITES, 0, 1))
        yield from _unless(numbers[column], *flags, *refuse_or_allow)
    for numbers in _SIGNAL.values():
        to_itself = (_step(_LOAD, _ARGUMENTS), _step(_EQUAL, process, 1, 0))
        yield from _unless(numbers[column], *to_itself, *refuse_or_allow)
    thread = (_step(_LOAD, _ARGUMENTS), _step(_ANY_BIT, _CLONE_THREAD, 1, 0))
    yield from _unless(_CLONE[column], *thread, *refuse_or_allow)
    yield _step(_RETURN, _ALLOW)


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("@HBBI", code, yes, no, value)


def _unless(number: int | None, *steps: bytes) -> Iterator[bytes]:
    """Steps for the system call of this number, at the end of which an answer stands."""
    if number is not None:
        yield _step(_EQUAL, number, 0, len(steps))
        yield from steps


def _restrict_files(readable: Sequence[Path]) -> bool:
    """Whether the kernel can keep all files from being read but those beneath these folders; it does then."""
    create, add, restrict = _LANDLOCK
    libc = _libc()
    version = libc.syscall(create, None, ctypes.c_size_t(0), _LANDLOCK_VERSION)
    if version < 1:  # built without it, or switched off
        return False
    handled = struct.pack("@Q", _HANDLED[min(version, len(_HANDLED) - 1)])
    rules = _ask("landlock", libc.syscall(create, handled, ctypes.c_size_t(len(handled)), 0))
    for folder in readable:
        try:
            place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        allowed = _READS if folder.is_dir() else _READS & ~0b1000
        rule = struct.pack("=Qi", allowed, place)
        _ask("landlock", libc.syscall(add, rules, 1, rule, 0))
        os.close(place)
    _ask("landlock", libc.syscall(restrict, rules, 0))
    os.close(rules)
    return True
