"""Fixtures that several tests of data share."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def hub_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a data set ``org/sums`` with two configs into the working directory, where a hub id is looked for first."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org" / "sums"
    configs = ""
    for config in ("main", "socratic"):
        (folder / config).mkdir(parents=True)
        configs += f"- config_name: {config}\n  data_files:\n"
        for split in ("train", "test"):
            (folder / config / f"{split}.jsonl").write_text(
                json.dumps({"question": f"{config} {split}", "answer": "2"})
            )
            configs += f"  - split: {split}\n    path: {config}/{split}.jsonl\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return "org/sums"
