"""Runs ``python ...`` as real processes without their imports, which take most of a short run.

A server for each process of pytest has imported the libraries and this repository, and has run nothing. A program is a
fork of it with its own folder, environment, arguments, files and process group. Three things differ from a fresh start,
and a test of those takes ``subprocess``: variables that a library reads on import, other than the rank; the hash seed,
which all forks share; and standard input, which is here a text that is there from the beginning.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import pytest
import torch
from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

ROOT = Path(__file__).parents[1]
IMPORTED = ["modules.cli.command", "modules.cli.chat_command", "datamodules", "callbacks", "pytest", "programs"]
IMPORTED += ["transformers.models.llama.modeling_llama", "torch.utils.tensorboard", "matplotlib.backends.backend_agg"]


@cache
def server() -> ForkServerContext:
    """Start the server; its forks are made by ``server().Process``, and by no other start method of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
        forkserver.ensure_running()
    return context


def become(arguments: Sequence[str], folder: Path, environment: dict[str, str], files: Path) -> None:
    """Be ``python *arguments``, which are ``-m MODULE ...`` or ``SCRIPT ...``."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        os.dup2(os.open(files / str(number), flags), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (multiprocessing has closed it)
    torch.default_generator.seed()
    numpy.random.seed()
    os.environ.clear()
    os.environ.update(environment)
    rank_zero_only.rank = _get_rank() or 0  # Lightning reads it when it is imported
    os.chdir(folder)
    module = arguments[0] == "-m"
    name, *sys.argv[1:] = arguments[module:]
    own = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    libraries = [part for part in sys.path if part.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [str(folder if module else Path(name).resolve().parent), *own, *libraries]
    try:
        if module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            sys.argv[0] = name
            runpy.run_path(name, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a child of multiprocessing leaves them out


class Program:
    """``python *arguments`` in ``folder`` as it runs; the end of ``with`` ends it.

    It imports from the repository and from the folders of ``path``; ``environment`` replaces that of this process.
    """

    def __init__(
        self,
        *arguments: str,
        folder: Path,
        path: Sequence[Path] = (),
        input: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.arguments, self.files = arguments, TemporaryDirectory()
        for number, text in enumerate((input, "", "")):
            (Path(self.files.name) / str(number)).write_text(text)
        own = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path))), "OMP_NUM_THREADS": "1"}
        everything = dict(os.environ if environment is None else environment) | own
        self.process = server().Process(target=become, args=(arguments, folder, everything, Path(self.files.name)))
        self.process.start()

    def said(self) -> tuple[str, str]:
        """Return what it has written to standard output and to standard error."""
        output, errors = ((Path(self.files.name) / number).read_text() for number in "12")
        return output, errors

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.files.cleanup()


def run_program(*arguments: str, timeout: float = 240, **settings: Any) -> CompletedProcess[str]:
    """Run a Program to its end; fail the test if the end does not come in time."""
    with Program(*arguments, **settings) as program:
        program.process.join(timeout)
        if program.process.is_alive():
            pytest.fail("\n".join([f"hangs after {timeout} s: {' '.join(arguments)}", *program.said()]))
        return CompletedProcess(arguments, program.process.exitcode, *program.said())


def run_ranks(*arguments: str, timeout: float = 240, **settings: Any) -> CompletedProcess[str]:
    """Run two Programs as the ranks of one run, and return the end of rank 0; fail the test unless both succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with ExitStack() as stack:
        ranks = []
        for rank in range(2):
            here = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", **place}
            ranks.append(stack.enter_context(Program(*arguments, environment={**os.environ, **here}, **settings)))
        end = time.monotonic() + timeout
        while any(rank.process.is_alive() for rank in ranks) and time.monotonic() < end:
            if any(rank.process.exitcode for rank in ranks):
                break  # the other one waits for it in vain
            time.sleep(0.02)
        status = [rank.process.exitcode for rank in ranks]
        if status != [0, 0]:
            said = "\n".join(f"-- rank {number}\n{rank.said()[1][-3000:]}" for number, rank in enumerate(ranks))
            pytest.fail(f"exit status {status}, None of one that hangs: {' '.join(arguments)}\n{said}")
        return CompletedProcess(arguments, 0, *ranks[0].said())
