"""Every file of the public samples gives as many rows as a naive reader finds, with an equal first and last row."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from datamodules import Files

DATA = Path(__file__).parents[3] / "shared" / "data"
MANIFEST = {entry["file"]: entry for entry in json.loads((DATA / "manifest.json").read_text())} if DATA.is_dir() else {}
HEADERS = {"flan-cot": ["question", "answer", "rationale"], "mgsm": ["question", "answer"]}
NUM_TEXTS = {
    "catqa_english": 400,
    "catqa_chinese": 400,
    "catqa_vietnamese": 400,
    "harmfulqa": 1360,
}  # the manifest counts categories
EMPTY = "self-instruct/t0_train_50k/trec_fine_grained_ABBR.jsonl"
FOLDERS = sorted({name.partition("/")[0] for name in MANIFEST})


def csv_records(text: str) -> list[list[str]]:
    """Split cells by hand: quotes hold separators and line breaks, and a doubled quote is one quote."""
    records, cells, cell, quoted, index = [], [], "", False, 0
    while index < len(text):
        letter = text[index]
        if quoted and text[index : index + 2] == '""':
            cell, index = cell + '"', index + 1
        elif letter == '"':
            quoted = not quoted
        elif not quoted and letter in ",\n":
            cells, cell = [*cells, cell.removesuffix("\r") if letter == "\n" else cell], ""
            if letter == "\n":
                records, cells = [*records, cells], []
        else:
            cell += letter
        index += 1
    return records if not cells and not cell else [*records, [*cells, cell]]


def naive(path: Path) -> list[Any]:
    if path.suffix in (".parquet", ".arrow"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = (
            pq.ParquetFile(path).read()
            if path.suffix == ".parquet"
            else pa.ipc.open_stream(path.read_bytes()).read_all()
        )
        return [{name: table[name][index].as_py() for name in table.column_names} for index in range(table.num_rows)]
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    if ".jsonl" in path.name:
        return [json.loads(line) for line in text.split("\n") if line]
    if path.suffix == ".csv":
        names, *records = csv_records(text)
        return [dict(zip(names, cells, strict=True)) for cells in records]
    if path.suffix == ".tsv":
        names = HEADERS[path.parent.name]
        return [
            dict(zip(names, line.replace(r"\n", "\n").split("\t"), strict=True))
            for line in text.replace("\r\n", "\n").split("\n")
            if line
        ]
    return objects(json.loads(text))


def objects(content: Any) -> list[Any]:
    """Return the rows of a JSON file: an array, ``examples``, ``instructions`` with ``tags``, or categories."""
    if isinstance(content, list):
        return content
    if "examples" in content:
        return content["examples"]
    if "instructions" in content:
        assert not content["inputs"]
        tags = [{"tags": tag} for tag in content["tags"]] if "tags" in content else [{}] * len(content["instructions"])
        return [{"instructions": text, **tag} for text, tag in zip(content["instructions"], tags, strict=True)]
    rows = []
    for category in content:
        for subcategory in content[category]:
            rows += [
                {"text": text, "category": category, "subcategory": subcategory}
                for text in content[category][subcategory]
            ]
    return rows


@pytest.mark.parametrize("name", sorted(MANIFEST) or ["manifest.json"])
def test_public_files(name: str) -> None:
    if not DATA.is_dir():
        pytest.skip("the public data samples are not here")
    source = Files(str(DATA / name), header=HEADERS.get(name.partition("/")[0]))
    if name == EMPTY:
        with pytest.raises(ValueError, match=r"^.*trec_fine_grained_ABBR\.jsonl: the file holds no rows$"):
            source.rows()
        return
    rows = source.rows()
    assert len(rows) == NUM_TEXTS.get(Path(name).stem, MANIFEST[name]["records"])
    assert len({row.origin for row in rows}) == len(rows)
    expected = [{"text": record} if isinstance(record, str) else record for record in naive(DATA / name)]
    for index in (0, -1):
        assert list(rows[index].columns) == list(expected[index])
        assert rows[index].columns == expected[index]
    assert len(rows) == len(expected)
    assert {tuple(row.columns) for row in rows} == {tuple(record) for record in expected}


def test_no_folder_is_forgotten() -> None:
    if not DATA.is_dir():
        pytest.skip("the public data samples are not here")
    assert sorted(path.name for path in DATA.iterdir() if path.is_dir()) == FOLDERS
