"""Runs an untrusted program in a process of its own, and lets another process call its functions.

``unit_tests`` runs this file by path. It gives up the rights that it can, and sends a JSON line with those that it
could not give up. It then reads lines from its input: first the program, then requests; see ``serve_program``. Only
plain values go back, so that the program can neither reach the tests nor hand them an object that claims to equal
everything.
"""

import builtins
import ctypes
import json
import math
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

LONGEST = 2**24  # bytes of a line, and of a file that the program writes
MOST_ITEMS = 10**6  # most items read from an iterator
OPEN_FILES, PROCESSES = 64, 64
SEQUENCES: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
PLAIN: tuple[Any, ...] = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset)

# Numbers of Linux's system calls on x86-64 and ARM64, -1 = it has none; from the kernel's tables
# arch/x86/entry/syscalls/syscall_64.tbl and scripts/syscall.tbl (older: include/uapi/asm-generic/unistd.h).
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_* of include/uapi/linux/audit.h
REFUSED = {
    # They start, signal, read, slow or limit other processes.
    "fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "kcmp": (312, 272), "perf_event_open": (298, 241), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # What they make is shared between processes, and outlives them.
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193),
    "semtimedop": (220, 192), "semctl": (66, 191), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181), "mq_notify": (244, 184),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # They change files, and Landlock does not ask where these lie, or did not in its first versions.
    "truncate": (76, 45), "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, -1), "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54), "utime": (132, -1),
    "utimes": (235, -1), "futimesat": (261, -1), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "removexattrat": (466, 466), "file_setattr": (469, 469), "flock": (73, 32),
    # They reach what listens elsewhere, or lead out of the sandbox.
    "socket": (41, 198), "connect": (42, 203), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "mount": (165, 40),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "open_by_handle_at": (304, 265),
}  # fmt: skip
UNKNOWN = {"clone3": (435, 435), "openat2": (437, 437)}  # their arguments cannot be filtered; libraries do without
PARENT_DIED, NO_NEW_PRIVILEGES, SET_FILTER = 1, 38, 22  # of prctl
CLONE_THREAD, CLONE_NEWUSER, CLONE_NEWNET = 0x10000, 0x10000000, 0x40000000
READ_AND_TRUNCATE = (0x200, 0x203)  # O_TRUNC without the right to write, of which Landlock 1 and 2 do not know
EVERY_BIT = 0xFFFFFFFF
FILE_COMMANDS = (*range(8), 9, *range(36, 39), *range(1030, 1035))  # those that set an owner, a signal or a lease lack
# Numbers, the place of an argument, the bits of it that count, and the values for which the call is allowed or refused.
# The kernel reads 32 bits of each.
ALLOWED_FOR = {
    "clone": ((56, 220), 0, CLONE_THREAD, (CLONE_THREAD,)),
    "fcntl": ((72, 25), 1, EVERY_BIT, FILE_COMMANDS),
    "ioctl": ((16, 29), 1, EVERY_BIT, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # size, state
    "prlimit64": ((302, 261), 0, EVERY_BIT, (0,)),  # its own limits
    "socketpair": ((53, 199), 1, 0xF, (1,)),  # a pair of datagrams could send elsewhere
}
REFUSED_FOR = {
    "open": ((2, -1), 1, 0x203, READ_AND_TRUNCATE),
    "openat": ((257, 56), 2, 0x203, READ_AND_TRUNCATE),
    "prctl": ((157, 167), 0, EVERY_BIT, (PARENT_DIED,)),
}
EPERM, ENOSYS = 1, 38
CAPABILITY_VERSION = 0x20080522
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
WRITE_FILE, TRUNCATE, IOCTL_DEVICE = 1 << 1, 1 << 14, 1 << 15
WRITES = WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # files: write, remove, and make any kind
WRITES_SINCE = {2: 1 << 13, 3: TRUNCATE, 5: IOCTL_DEVICE}  # by Landlock's version; 1 << 13 = move between folders


def pack(value: Any, name_object: Callable[[Any], int]) -> Any:
    """Return a value as JSON has it; what is not plain is replaced by the number that ``name_object`` gives it.

    Iterators are read, and subclasses of plain types become these; numpy's values become numbers and lists.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        return value if abs(value) < 2**63 else {"int": hex(value)}
    if kind is list:
        return [pack(part, name_object) for part in value]
    if kind in SEQUENCES.values():
        return {kind.__name__: [pack(part, name_object) for part in value]}
    if kind is dict:
        return {"dict": [[pack(key, name_object), pack(part, name_object)] for key, part in value.items()]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    for plain in PLAIN:
        if isinstance(value, plain):
            return pack(plain(value), name_object)
    if kind.__module__ == "numpy" and hasattr(value, "tolist"):
        return pack(value.tolist(), name_object)
    if hasattr(kind, "__next__"):
        return {"iterator": [pack(part, name_object) for part in islice(value, MOST_ITEMS)]}
    return {"object": name_object(value)}


def unpack(value: Any, find_object: Callable[[int], Any]) -> Any:
    """Return what ``pack`` packed; objects are what ``find_object`` makes of their numbers.

    Raises:
        ValueError: it is nothing that ``pack`` makes.
    """
    if isinstance(value, list):
        return [unpack(part, find_object) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "object":
        return find_object(inner)
    if kind == "int":
        return int(inner, 16)
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind in ("complex", "range"):
        return {"complex": complex, "range": range}[kind](*inner)
    parts = unpack(inner, find_object)
    if kind == "iterator":
        return iter(parts)
    if kind == "dict":
        return {key: part for key, part in parts}
    if kind in SEQUENCES:
        return SEQUENCES[kind](parts)
    raise ValueError(f"no value: {kind}")


class Host:
    """The program's side: runs it, keeps its objects and answers requests.

    A request is {"get": name}, {"attribute": name, "object": number}, {"set": name, "to": value, "object": number}, or
    {"object": number, "positional": [...], "named": {...}}, which calls it. The answer is {"value": ...}, with
    "positional" if the call changed them, or {"raised": name of the exception, "message": str}.
    """

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
        self.objects: list[Any] = []

    def keep(self, value: Any) -> int:
        """Return the number of an object."""
        self.objects.append(value)
        return len(self.objects) - 1

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked."""
        try:
            if "get" in request:
                if request["get"] not in self.names:
                    raise NameError(request["get"])
                return {"value": pack(self.names[request["get"]], self.keep)}
            target = self.objects[request["object"]]
            if "attribute" in request:
                return {"value": pack(getattr(target, request["attribute"]), self.keep)}
            if "set" in request:
                setattr(target, request["set"], unpack(request["to"], self.objects.__getitem__))
                return {"value": None}
            positional = unpack(request["positional"], self.objects.__getitem__)
            value = target(*positional, **unpack(request["named"], self.objects.__getitem__))
            answer = {"value": pack(value, self.keep)}
            if any(isinstance(part, list | dict | set) for part in positional):
                left = pack(positional, self.keep)
                answer |= {"positional": left} if left != request["positional"] else {}
            return answer
        except BaseException as error:
            return {"raised": type(error).__name__, "message": str(error)[:1000]}


def limit_resources(seconds: float, memory: int) -> None:
    """Bound the processor time, memory, file size and open files of this process and of what it starts."""
    limits = {
        "RLIMIT_CPU": math.ceil(seconds) + 1,
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": LONGEST,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CORE": 0,
    }
    for name, limit in limits.items():
        set_limit(name, limit)


def set_limit(name: str, limit: int) -> None:
    """Set one limit for good, where the system has it."""
    number = getattr(resource, name)
    hard = resource.getrlimit(number)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    with suppress(ValueError, OSError):  # macOS has no limit of the address space
        resource.setrlimit(number, (limit, limit))


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends, where it can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)


def write_filter(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the steps of the seccomp filter, in the kernel's classic BPF: operation, two jumps, operand."""
    load, equal, at_least, keep_bits, give_back = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, kill, refuse = (
        (give_back, 0, 0, 0x7FFF0000),
        (give_back, 0, 0, 0x80000000),
        (give_back, 0, 0, 0x50000 | EPERM),
    )
    column = list(ARCHITECTURES).index(machine)
    steps = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURES[machine]), kill, (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, 0x40000000), refuse]  # x86-64's second set of numbers
    for calls, answer in ((REFUSED, refuse), (UNKNOWN, (give_back, 0, 0, 0x50000 | ENOSYS))):
        for numbers in calls.values():
            if numbers[column] >= 0:
                steps += [(equal, 0, 1, numbers[column]), answer]
    for rules, hit, miss in ((ALLOWED_FOR, allow, refuse), (REFUSED_FOR, refuse, allow)):
        for numbers, argument, bits, values in rules.values():
            if numbers[column] >= 0:
                count = len(values)
                steps += [(equal, 0, count + 4, numbers[column])]
                steps += [(load, 0, 0, 16 + 8 * argument), (keep_bits, 0, 0, bits)]
                steps += [(equal, count - i, 0, value) for i, value in enumerate(values)]
                steps += [miss, hit]
    return [*steps, allow]


def give_up_processes(libc: Any) -> bool:
    """Refuse the system calls of the tables above; False = not possible.

    Threads can still be started, and files that are open for writing can be made shorter.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in ARCHITECTURES or sys.byteorder != "little":
        return False
    steps = write_filter(machine)
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(filters)))
    return bool(libc.prctl(SET_FILTER, ctypes.c_ulong(2), program, ctypes.c_ulong(0), ctypes.c_ulong(0)) == 0)


def give_up_writing(libc: Any, folder: Path) -> bool:
    """Refuse to write, make, move or remove files outside ``folder``; False = the kernel has no Landlock."""
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1) if sys.platform == "linux" else 0
    if version < 1:
        return False
    writes = WRITES | sum(right for since, right in WRITES_SINCE.items() if version >= since)
    rules = libc.syscall(LANDLOCK_CREATE, struct.pack("Q", writes), ctypes.c_size_t(8), 0)
    for path, rights in ((folder, writes), (Path(os.devnull), writes & (WRITE_FILE | TRUNCATE | IOCTL_DEVICE))):
        place = os.open(path, os.O_PATH)
        libc.syscall(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    return bool(libc.syscall(LANDLOCK_RESTRICT, rules, 0) == 0)


def give_up_rights(seconds: float, memory: int) -> list[str]:
    """Bound this process for good; return what it could not give up: ``network``, ``processes``, ``files``."""
    limit_resources(seconds, memory)
    if sys.platform != "linux":
        set_limit("RLIMIT_NPROC", PROCESSES)
        return ["network", "processes", "files"]
    libc = ctypes.CDLL(None, use_errno=True)
    die_with_parent()
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    alone = libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0
    libc.capset(struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24))  # what root may do beyond its own files
    writing = give_up_writing(libc, Path.cwd())
    processes = give_up_processes(libc)
    if alone or not processes:  # else the limit would count what the user runs elsewhere
        set_limit("RLIMIT_NPROC", PROCESSES)
    done = {"network": alone or processes, "processes": processes, "files": writing}
    return [right for right, given_up in done.items() if not given_up]


def serve_program(seconds: float, memory: int) -> None:
    """Run the program that comes first, then answer requests until the input ends."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    host, number = Host(), os.getpid()
    left = give_up_rights(seconds, memory)
    sys.stdin, sys.argv = open(0, closefd=False), ["program"]  # noqa: SIM115

    def send(answer: dict[str, Any]) -> None:
        try:
            line = json.dumps(answer).encode()
        except (ValueError, RecursionError) as error:
            line = json.dumps({"raised": type(error).__name__, "message": ""}).encode()
        rest = memoryview(line + b"\n")
        while rest:
            rest = rest[os.write(answers, rest) :]

    send({"left": left})
    program = json.loads(requests.readline() or '""')
    try:
        exec(compile(program, "program", "exec", dont_inherit=True), host.names)
        send({"value": None})
    except BaseException as error:
        send({"raised": type(error).__name__, "message": str(error)[:1000]})
    for line in requests:
        send(host.answer(json.loads(line)))
    os._exit(0 if os.getpid() == number else 1)


if __name__ == "__main__":
    sys.path += sys.argv[3:]
    serve_program(float(sys.argv[1]), int(sys.argv[2]))
