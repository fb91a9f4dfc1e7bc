"""Copies of shipped YAML files with few rows and small batches: reading 8000 rows takes longer than most tests."""

import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = {r"num_(?:examples|texts|facts)": 120, "passes": 2}  # at most; facts come in twenties
BATCHES = {"batch_size|prompts_per_phase": 16, "val_batch_size": 64}
COPIES = TemporaryDirectory()  # of this process


def lower(text: str, most: dict[str, int]) -> str:
    """Lower the numbers of a YAML text that are higher; keys are patterns of names."""
    for names, highest in most.items():
        pattern = rf"(\b(?:{names}): )(\d+)"
        text = re.sub(pattern, lambda found, highest=highest: f"{found[1]}{min(highest, int(found[2]))}", text)
    return text


@cache
def few_rows(method: str) -> str:
    """Return the path of a copy of ``configs/tiny/<method>.yaml`` with few rows, or of the method's other file."""
    tiny = CONFIGS / f"tiny/{method}.yaml"
    path = tiny if tiny.is_file() else CONFIGS / f"{method}.yaml"
    copy = Path(COPIES.name) / path.name
    copy.write_text(lower(path.read_text(), ROWS))
    return str(copy)
