"""Feeds generated rows, files, configurations and command lines to the program: does bad input ever end in a traceback?

Run: make fuzz

Each input must be accepted, with every row used or counted as left out, or be refused by one sentence. The last line is
``fuzz: 5000 inputs, 0 tracebacks, 0 rows lost``; otherwise the exit status is 1 and each fault is printed once with its
smallest input.
"""

import argparse
import contextlib
import csv
import io
import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import yaml  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from datamodules import (  # noqa: E402
    InstructionDataModule,
    PreferenceDataModule,
    PretrainingDataModule,
    VerifiableDataModule,
)
from datamodules.formats.table import OURS, PAIRS  # noqa: E402
from datamodules.sources.files import Files, read_rows  # noqa: E402
from modules.__main__ import main as run_command  # noqa: E402
from modules.networks.tiny import tiny_tokenizer  # noqa: E402

ENDINGS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt", "ndjson")
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs/tiny").glob("*.yaml"))}
KINDS = (InstructionDataModule, PreferenceDataModule, PretrainingDataModule, VerifiableDataModule)
SHAPES = (  # what the columns of a readable row are
    ("prompt", "completion"),
    ("messages",),
    ("text",),
    ("instruction", "input", "output"),
    ("prompt", "chosen", "rejected"),
    ("prompt", "completions", "scores"),
    ("prompt", "completion", "label"),
    ("prompt", "response_a", "response_b", "winner"),
    ("prompt", "answer"),
    ("question", "options", "answer"),
)
FIELDS = ("role", "content", "from", "value", "tool_calls", "weight", "name", "thinking", "type", "text", "arguments")
WORDS = (
    "user",
    "assistant",
    "system",
    "tool",
    "a",
    "b",
    "tie",
    "yes",
    "no",
    "1",
    "0",
    "",
    " ",
    "<think>",
    "#### 5",
    "\\boxed{2}",
)

texts = st.one_of(
    st.sampled_from(WORDS), st.text(max_size=12), st.text(st.characters(categories=["Cs", "Cc", "Lo"]), max_size=4)
)
numbers = st.one_of(st.integers(-2, 3), st.floats(), st.integers(), st.booleans(), st.none())
messages = st.lists(st.dictionaries(st.sampled_from(FIELDS), st.one_of(texts, numbers), max_size=4), max_size=4)
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(texts, numbers, messages),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(texts, st.sampled_from(FIELDS)), inner, max_size=3)
    ),
    max_leaves=6,
)
names = st.one_of(st.sampled_from([*OURS, *(name for pair in PAIRS for name in pair)]), texts)


@st.composite
def generate_rows(draw: Callable[..., Any]) -> list[dict[str, Any]]:
    """Give one to four rows near a known shape: the same columns, but for a few that are missing or too many."""
    columns = draw(st.sampled_from(SHAPES))
    more = draw(st.lists(names, max_size=2))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        present = [name for name in (*columns, *more) if draw(st.integers(0, 9)) > 0]
        rows.append({name: draw(st.one_of(texts, values)) for name in present})
    return rows


def write_json(value: Any) -> str:
    """Write JSON as a careless tool would: lone surrogates, NaN and infinity included."""
    return json.dumps(value)


class Fuzz:
    """Counts inputs, tracebacks and lost rows, and keeps one example of each fault."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = self.tracebacks = self.lost = 0
        self.faults: dict[str, tuple[str, str]] = {}  # place of a fault -> its smallest input and its traceback

    def try_input(self, shown: str, action: Callable[[], None]) -> None:
        """Run an action: it may succeed, or refuse its input by a ValueError or an exit with one sentence."""
        self.inputs += 1
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                action()
        except (ValueError, FileNotFoundError) as error:
            if type(error) not in (ValueError, FileNotFoundError) and not type(error).__module__.startswith(
                ("modules", "datamodules")
            ):
                self.keep(shown, error)  # such as a UnicodeEncodeError: nobody wrote it for a reader
        except SystemExit as exit:
            if exit.code not in (0, None) and "error: " not in said.getvalue():
                self.keep(shown, exit)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.keep(shown, error)

    def keep(self, shown: str, error: BaseException) -> None:
        """Count a traceback and keep the smallest input for its place."""
        self.tracebacks += 1
        place = traceback.extract_tb(error.__traceback__)[-1]
        own = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if str(ROOT) in frame.filename and "tests" not in frame.filename
        ]
        key = (
            f"{type(error).__name__} {own[-1].filename if own else place.filename}:{(own[-1] if own else place).lineno}"
        )
        if key not in self.faults or len(shown) < len(self.faults[key][0]):
            self.faults[key] = (shown, "".join(traceback.format_exception(error))[-1500:])

    def read_rows(self, rows: list[dict[str, Any]], kind: type, ending: str, drop: bool) -> None:
        """Read rows by a DataModule from a file, and compare the rows that went in with those it accounts for."""
        path = self.folder / f"rows.{ending}"
        if ending == "csv":
            columns = list(dict.fromkeys(name for row in rows for name in row))
            with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
                writer = csv.DictWriter(file, columns)
                with contextlib.suppress(csv.Error):
                    writer.writeheader()
                    writer.writerows(rows)
        else:
            path.write_text("".join(write_json(row) + "\n" for row in rows) if ending == "jsonl" else write_json(rows))
        tokenizer = tiny_tokenizer()

        def read() -> None:
            settings = {"on_bad_row": "drop"} if drop and kind is not VerifiableDataModule else {}
            data = kind(tokenizer, str(path), **settings)
            data.setup("fit")
            known = len(read_rows(str(path)))
            told = sum(data.reading.counts.values()) if hasattr(data, "reading") else known
            self.lost += abs(known - told) + (abs(known - len(rows)) if ending != "csv" else 0)
            if known != told or (ending != "csv" and known != len(rows)):
                self.faults.setdefault(
                    f"rows lost by {kind.__name__}", (write_json(rows), f"{len(rows)} in, {known} read, {told} told")
                )

        self.try_input(f"{kind.__name__} {ending} drop={drop} {write_json(rows)}", read)

    def read_file(self, content: bytes, ending: str) -> None:
        """Read bytes as a file of a format."""
        path = self.folder / f"bytes.{ending}"
        path.write_bytes(content)
        self.try_input(f"file .{ending} {content!r}", lambda: Files(str(path)).rows() and None)

    def run(self, arguments: list[str], config: str = "") -> None:
        """Run a command line for a batch; ``config`` is the text of its configuration."""
        self.try_input(" ".join(arguments) + "\n" + config, lambda: run_command(arguments))


def walk(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths to all leaves and branches of a configuration."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(found for key, value in inner for found in walk(value, (*path, key)))]


def replace(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return the configuration with another value at a path."""
    if not path:
        return value
    tree[path[0]] = replace(tree[path[0]], path[1:], value)
    return tree


def main() -> int:
    """Try the inputs and print the faults and the counts."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--inputs", type=int, default=5000)
    total = parser.parse_args().inputs
    for name in ("lightning.pytorch", "lightning.fabric", "datasets", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    def times(share: float) -> Any:
        return settings(
            max_examples=int(total * share),
            database=None,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )

    plain = st.one_of(
        numbers,
        st.sampled_from(["-1", "nan", ".inf", "1e400", "x", "", "null", "[]", "{}", "tiny", "os.system"]),
        texts,
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        fuzz = Fuzz(Path(folder))
        small = [
            "--config",
            str(ROOT / "configs/overlays/cpu_tiny.yaml"),
            "--trainer.fast_dev_run=true",
            f"--out={folder}/run",
        ]

        @times(0.7)
        @given(generate_rows(), st.sampled_from(KINDS), st.sampled_from(["jsonl", "json", "csv"]), st.booleans())
        def rows(rows: list[dict[str, Any]], kind: type, ending: str, drop: bool) -> None:
            fuzz.read_rows(rows, kind, ending, drop)

        @times(0.24)
        @given(
            st.one_of(
                st.binary(max_size=60),
                texts.map(lambda text: text.encode(errors="surrogatepass")),
                values.map(lambda value: write_json(value).encode()),
            ),
            st.sampled_from(ENDINGS),
        )
        def files(content: bytes, ending: str) -> None:
            fuzz.read_file(content, ending)

        @times(0.03)
        @given(st.sampled_from(sorted(CONFIGS)), st.data())
        def configs(name: str, data: Any) -> None:
            tree = yaml.safe_load(CONFIGS[name].read_text())
            changed = replace(tree, data.draw(st.sampled_from(walk(tree))), data.draw(st.one_of(plain, values)))
            try:
                Path("c.yaml").write_text(yaml.safe_dump(changed))
            except (yaml.YAMLError, UnicodeEncodeError):
                return
            command = "predict" if name == "knowledge" else "fit"
            fuzz.run([command, "--config", "c.yaml", *small], Path("c.yaml").read_text())

        @times(0.03)
        @given(st.sampled_from(sorted(CONFIGS)), st.data())
        def options(name: str, data: Any) -> None:
            tree = yaml.safe_load(CONFIGS[name].read_text())
            keys = [path for path in walk(tree) if path and all(isinstance(key, str) for key in path)]
            key = ".".join(part for part in data.draw(st.sampled_from(keys)) if part not in ("class_path", "init_args"))
            value = str(data.draw(plain)).replace("\0", "").encode(errors="ignore").decode()
            fuzz.run(
                [
                    "predict" if name == "knowledge" else "fit",
                    "--config",
                    str(CONFIGS[name]),
                    *small,
                    f"--{key}={value}",
                ]
            )

        for part in (rows, files, configs, options):
            part()
    for place, (shown, trace) in fuzz.faults.items():
        print(f"\n== {place}\n{shown[:600]}\n{trace}")
    print(f"fuzz: {fuzz.inputs} inputs, {fuzz.tracebacks} tracebacks, {fuzz.lost} rows lost")
    return int(bool(fuzz.faults))


if __name__ == "__main__":
    sys.exit(main())
