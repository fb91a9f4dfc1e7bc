"""Runs an untrusted program in a process of its own, and lets another process call its functions.

``unit_tests`` runs this file by path. It gives up what it may, and sends a JSON line with what it could not give up. It
then reads lines from its input: first the program, then requests; see ``serve``. Only plain values go back, so that the
program can neither reach the tests nor hand them an object that claims to equal everything.
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
MOST_ITEMS = 10**6  # of an iterator
OPEN_FILES, PROCESSES = 64, 64
SEQUENCES: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
PLAIN: tuple[Any, ...] = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset)

# Linux numbers: the architecture in the kernel's words, clone, and the calls that start or signal processes, read their
# memory, open sockets or leave the sandbox.
SYSTEM_CALLS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        56,
        (41, 57, 58, 59, 62, 101, 129, 165, 200, 234, 272, 297, 298, 308, 310, 311, 321, 322, 424, 425, 434),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (40, 97, 117, 129, 130, 131, 138, 198, 221, 240, 241, 268, 270, 271, 280, 281, 424, 425, 434),
    ),
}
CLONE3, CLONE_THREAD, CLONE_NEWUSER, CLONE_NEWNET = 435, 0x10000, 0x10000000, 0x40000000
PARENT_DIED, NO_NEW_PRIVILEGES, SET_FILTER = 1, 38, 22  # of prctl
EPERM, ENOSYS = 1, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
WRITE_FILE = 1 << 1
WRITES = WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # files: write, remove, and make any kind


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

    A request is {"get": name}, {"attribute": name, "object": number}, or {"object": number, "positional": [...],
    "named": {...}}, which calls it. The answer is {"value": ...}, with "positional" if the call changed them, or
    {"raised": name of the exception, "message": str}.
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
    """Let the kernel kill this process when the one that started it ends, where it can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)


def give_up_processes(libc: Any) -> bool:
    """Refuse every system call that starts, signals or reads another process or opens a socket; False = not possible.

    Threads can still be started.
    """
    if sys.platform != "linux" or os.uname().machine not in SYSTEM_CALLS or sys.byteorder != "little":
        return False
    architecture, clone, refused = SYSTEM_CALLS[os.uname().machine]
    load, equal, at_least, has_bit, give_back = 0x20, 0x15, 0x35, 0x45, 0x06
    refusal = 0x50000
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give_back, 0, 0, 0x80000000), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (give_back, 0, 0, refusal | EPERM)]
    for number in refused:
        code += [(equal, 0, 1, number), (give_back, 0, 0, refusal | EPERM)]
    code += [(equal, 0, 1, CLONE3), (give_back, 0, 0, refusal | ENOSYS)]
    code += [(equal, 0, 3, clone), (load, 0, 0, 16), (has_bit, 1, 0, CLONE_THREAD), (give_back, 0, 0, refusal | EPERM)]
    code += [(give_back, 0, 0, 0x7FFF0000)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters)))
    return bool(libc.prctl(SET_FILTER, ctypes.c_ulong(2), program, ctypes.c_ulong(0), ctypes.c_ulong(0)) == 0)


def give_up_writing(libc: Any, folder: Path) -> bool:
    """Refuse to write, make or remove files outside ``folder``; False = the kernel has no Landlock."""
    if sys.platform != "linux" or libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1) < 1:
        return False
    rules = libc.syscall(LANDLOCK_CREATE, struct.pack("Q", WRITES), ctypes.c_size_t(8), 0)
    for path, rights in ((folder, WRITES), (Path(os.devnull), WRITE_FILE)):
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
    writing = give_up_writing(libc, Path.cwd())
    processes = give_up_processes(libc)
    if alone or not processes:  # else the limit would count what the user runs elsewhere
        set_limit("RLIMIT_NPROC", PROCESSES)
    done = {"network": alone or processes, "processes": processes, "files": writing}
    return [right for right, given_up in done.items() if not given_up]


def serve(seconds: float, memory: int) -> None:
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
    serve(float(sys.argv[1]), int(sys.argv[2]))
