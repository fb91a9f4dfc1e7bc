"""A server that speaks vLLM's protocol over a real small model, in a process of its own; CI has no vLLM.

    python fake_vllm.py --model FOLDER --port PORT ...        with the options of vLLM's server

It is stricter than vLLM: the calls of an update must come in order and while it is paused, and a paused server answers
503. A sampled request is kept as vLLM keeps keys and values, so that weights without a reset of the cache do not show.
Choices come in reverse. The folder FAKE_VLLM holds what it reports, ``calls.jsonl``, and ``faults.json``, which makes it
fail; it is read at every call.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modules.networks.loading import read_max_positions
from modules.rollout import InProcessEngine, Sampling
from modules.rollout.syncing import probe_logprobs

REPORTS = Path(os.environ["FAKE_VLLM"])
OPTIONS = {
    "--load-format": "dummy",
    "--logprobs-mode": "processed_logprobs",
    "--max-logprobs": "-1",
    "--generation-config": "vllm",
    "--host": "127.0.0.1",
    "--worker-extension-cls": "weight_files.WorkerMethods",
    "--weight-transfer-config": '{"backend": "files"}',
    "--dtype": "float32",
}


@dataclass
class Model:
    """What the engine samples from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]

    @property
    def max_positions(self) -> int | None:
        return read_max_positions(self.model.config)


class Failed(Exception):
    """Answered with status 500."""


class FakeServer:
    """The state of the server."""

    def __init__(self, folder: str, name: str) -> None:
        config = AutoConfig.from_pretrained(folder)
        torch.manual_seed(len(REPORTS.joinpath("calls.jsonl").read_text()) if report_exists() else 0)
        model = AutoModelForCausalLM.from_config(config).eval()
        self.policy = Model(model, AutoTokenizer.from_pretrained(folder), frozenset())
        self.engine = InProcessEngine()
        self.name, self.version = name, "default"
        self.paused, self.loaded, self.engine_lock = False, None, threading.Lock()
        self.cache: dict[str, Any] = {}
        self.tokens, self.resets = 0, 0

    def answer(self, path: str, query: dict[str, list[str]], body: dict[str, Any], faults: dict[str, Any]) -> Any:
        match path:
            case "/health":
                return ""
            case "/metrics":
                return f'vllm:generation_tokens_total{{engine="0"}} {self.tokens}\n'
            case "/v1/models":
                return {"data": [{"id": self.name}]}
            case "/server_info":
                return {"vllm_config": {"model_config": {**ASKED, "max_logprobs": -1} | faults.get("config", {})}}
            case "/collective_rpc":
                assert body["method"] == "tell_device"
                return {"results": ["cpu"]}
            case "/weight_info":
                return {"weight_version": faults.get("version", self.version)}
            case "/init_weight_transfer_engine":
                assert body == {"init_info": {}}
                return {"message": "done"}
            case "/pause":
                assert query == {"mode": ["wait"]}
                self.paused = True
                return {"status": "paused"}
            case "/resume":
                self.paused = False
                return {"status": "resumed"}
            case "/start_weight_update":
                self.expect(self.paused, "not paused")
                self.expect(self.loaded is None, "start_weight_update called while a weight update is already active")
                self.loaded = set()
                self.policy.model.tie_weights()
                self.head = self.policy.model.get_output_embeddings().weight.detach().clone()
                return {"message": "done"}
            case "/update_weights":
                self.expect(self.loaded is not None, "start_weight_update must be called before update_weights")
                assert self.loaded is not None
                if faults.get("half_update") and self.loaded:
                    self.loaded = None
                    raise Failed("Worker failed with error 'no room on the device'")
                weights = load_file(body["update_info"]["path"])
                found = self.policy.model.load_state_dict(weights, strict=False)
                assert not found.unexpected_keys
                self.loaded |= set(weights)
                return {"message": "done"}
            case "/finish_weight_update":
                self.expect(self.loaded is not None, "finish_weight_update without start_weight_update")
                assert self.loaded is not None
                missing = {name for name, _ in self.policy.model.named_parameters()} - self.loaded
                self.expect(not missing, f"the update holds no weights for {missing}")
                if faults.get("stale_head"):
                    self.policy.model.lm_head.weight = torch.nn.Parameter(self.head)
                self.loaded, self.version = None, body["weight_version"]
                return {"message": "done"}
            case "/reset_prefix_cache":
                self.resets += 1
                if self.resets <= faults.get("cache_in_use", 0):
                    return {"success": False}
                self.cache = {}
                return {"success": True}
            case "/v1/completions":
                return self.complete(body, faults)
        raise Failed(f"no such path: {path}")

    def expect(self, fine: bool, message: str) -> None:
        if not fine:
            raise Failed(message)

    def complete(self, body: dict[str, Any], faults: dict[str, Any]) -> Any:
        assert body["model"] == self.name and body["add_special_tokens"] is False
        if "prompt_logprobs" in body:
            row = body["prompt"]
            scores = probe_logprobs(self.policy.model, [row])[0]
            told = [{str(token): {"logprob": score}} for token, score in zip(row[1:], scores, strict=True)]
            return {"choices": [{"prompt_logprobs": [None, *told]}]}
        assert body["n"] == 1 or body["temperature"] > 0, "n must be 1 when using greedy sampling"
        assert 0 <= body["seed"] < 2**32 and body["ignore_eos"] and body["return_token_ids"] and body["logprobs"] == 0
        if body["seed"] == faults.get("at_seed"):
            forgive()
            match faults["how"]:
                case "die":
                    os._exit(3)
                case "hang":
                    time.sleep(1000)
                case "garbage":
                    return {"choices": [{"index": 0, "token_ids": []}]}
        key = json.dumps(body, sort_keys=True)
        with self.engine_lock:
            if key not in self.cache:
                self.cache[key] = self.sample(body)
            return {"choices": self.cache[key][::-1]}

    def sample(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        self.policy.stop_token_ids = frozenset(body["stop_token_ids"])
        sampling = Sampling(
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"],
            max_completion_length=body["max_tokens"],
            stop=tuple(body["stop"]),
        )
        self.engine.sync_weights(self.policy, 0)
        group = self.engine.generate([body["prompt"]], body["n"], sampling, [body["seed"]])[0]
        self.tokens += sum(len(each.token_ids) for each in group)
        return [
            {
                "index": index,
                "prompt_token_ids": body["prompt"],
                "token_ids": each.token_ids,
                "logprobs": {"token_logprobs": each.logprobs},
                "finish_reason": each.finish,
            }
            for index, each in enumerate(group)
        ]


def report_exists() -> bool:
    return REPORTS.joinpath("calls.jsonl").is_file()


def forgive() -> None:
    """Let the next server be a good one."""
    whole = REPORTS / f"{threading.get_ident()}.json"
    whole.write_text("{}")
    whole.replace(REPORTS / "faults.json")


def report(**values: Any) -> None:
    with REPORTS.joinpath("calls.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        faults = json.loads(REPORTS.joinpath("faults.json").read_text())
        report(path=url.path, body=body if url.path == "/v1/completions" else None)
        try:
            if url.path == "/v1/completions" and self.state.paused:
                self.say(503, {"error": {"message": "paused"}})
            else:
                self.say(200, self.state.answer(url.path, parse_qs(url.query), body, faults))
        except (Failed, AssertionError) as error:
            self.say(500, {"error": {"message": f"{type(error).__name__} {error}"}})

    do_POST = do_GET

    def say(self, status: int, answer: Any) -> None:
        content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        print(format % args, flush=True)


class Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 300

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that does not wait for the answer is part of the tests."""


ASKED = {"logprobs_mode": "processed_logprobs", "generation_config": "vllm"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--served-model-name")
    parser.add_argument("--port", type=int)
    asked, _ = parser.parse_known_args()
    for option, value in OPTIONS.items():
        assert sys.argv[sys.argv.index(option) + 1] == value, option
    assert os.environ["VLLM_SERVER_DEV_MODE"] == "1"
    assert not list(Path(asked.model).glob("*.safetensors"))
    if json.loads(REPORTS.joinpath("faults.json").read_text()).get("no_start"):
        sys.exit("RuntimeError: no room for the cache")
    torch.set_num_threads(1)
    core = subprocess.Popen(["sleep", "600"])  # vLLM's engine core outlives a server that is killed
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    Handler.state = FakeServer(asked.model, asked.served_model_name)
    report(pids=[os.getpid(), core.pid], argv=sys.argv)
    Quiet(("127.0.0.1", asked.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
