"""Files of every format, and damaged ones."""

import contextlib
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from datamodules import Addition, Files, InstructionDataModule, VerifiableDataModule
from datamodules.formats.prompt_shapes import verifiable_example
from datamodules.formats.reading import Reading
from datamodules.sources.files import read_rows
from datamodules.sources.locations import explain_hub_error
from datamodules.tokens.encoding import encode_prompt
from modules.networks.tiny import tiny_tokenizer

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
TEXTS = ["plain", "line\u2028separator\u2029and\x0btab\x85end", "", "0042", 'quote " comma , newline \n end']
RECORDS = [{"id": f"00{index}", "text": text} for index, text in enumerate(TEXTS)]


def write_jsonl(path: Path) -> None:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS), encoding="utf-8", newline=""
    )


def write_csv(path: Path) -> None:
    cells = [["id", "text"], *([record["id"], record["text"]] for record in RECORDS)]
    path.write_bytes(
        "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\r\n" for row in cells).encode()
    )


def write_table(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(RECORDS)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    opened = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
    with opened(str(path), table.schema) as writer:
        writer.write_table(table)


def write(path: Path) -> None:
    if path.suffix == ".gz":
        write_jsonl(path)
        path.write_bytes(gzip.compress(path.read_bytes()))
    elif path.suffix == ".jsonl":
        write_jsonl(path)
    elif path.suffix == ".json":
        content = RECORDS if path.stem == "array" else {"canary": "do not train", "examples": RECORDS}
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        write_csv(path)
    else:
        write_table(path)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "array.json", "object.json", "a.csv", "a.parquet", "stream.arrow", "file.arrow"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    rows = Files(str(tmp_path / name)).rows()
    assert [row.columns for row in rows] == RECORDS
    assert all(row.origin.startswith(str(tmp_path / name)) for row in rows)
    assert len({row.origin for row in rows}) == len(rows)


def test_origins_are_lines_even_behind_cells_with_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,answer\r\n"two\nlines",007\r\nlast,08\r\n', newline="")
    rows = Files(str(path)).rows()
    assert [row.origin for row in rows] == [f"{path}:2", f"{path}:4"]
    assert [row.columns["answer"] for row in rows] == ["007", "08"]
    path = tmp_path / "b.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}')
    assert [row.origin for row in Files(str(path)).rows()] == [f"{path}:1", f"{path}:3"]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", '{"a": "b"}\n'), ("a.csv", "a\nb\n"), ("a.json", '[{"a": "b"}]')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert [row.columns for row in Files(str(tmp_path / name)).rows()] == [{"a": "b"}]


def test_folder_reads_its_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"a": "2"}\n')
    (tmp_path / "a.csv").write_text("a\n1\n")
    (tmp_path / "README.md").write_text("not data")
    assert [row.columns["a"] for row in Files(str(tmp_path)).rows()] == ["1", "2"]


def test_subfolders_are_not_read_and_the_message_says_so(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jsonl").write_text('{"a": "1"}\n')
    with pytest.raises(
        ValueError, match=r"no file that ends in .*; subfolders are not read, so name one of them: train/"
    ):
        Files(str(tmp_path)).rows()


def test_tab_separated_cells_keep_their_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('question\tanswer\nsay "hi"\t"2\n')
    assert [row.columns for row in Files(str(tmp_path / "a.tsv")).rows()] == [{"question": 'say "hi"', "answer": '"2'}]


def columns_of(path: Path, content: str | bytes, **arguments: Any) -> list[dict[str, Any]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [row.columns for row in Files(str(path), **arguments).rows()]


def test_texts_in_the_place_of_rows(tmp_path: Path) -> None:
    expected = [{"text": 'say "hi"\u2028now'}, {"text": ""}, {"text": "x", "id": 1}]
    lines = ['"say \\"hi\\"\u2028now"', '""', '{"text": "x", "id": 1}']
    assert columns_of(tmp_path / "a.jsonl", "\r\n".join(lines)) == expected
    assert columns_of(tmp_path / "a.json", f"[{', '.join(lines)}]") == expected


COLUMN_WISE = [
    (
        {"instructions": ["a", "b"], "tags": ["x", None], "inputs": []},
        [{"instructions": "a", "tags": "x"}, {"instructions": "b", "tags": None}],
    ),
    ({"instructions": ["a"], "inputs": []}, [{"instructions": "a"}]),
    ({"licence": "MIT", "prompts": ["a", "b"]}, [{"prompts": "a"}, {"prompts": "b"}]),
    (
        {"prompt": ["a", "b"], "info": [{"level": 1}, {}]},
        [{"prompt": "a", "info": {"level": 1}}, {"prompt": "b", "info": {}}],
    ),
    ({"canary": "do not train", "tags": [], "examples": [{"a": 1}, {"a": 2}]}, [{"a": 1}, {"a": 2}]),
]


@pytest.mark.parametrize(("content", "expected"), COLUMN_WISE)
def test_objects_of_lists(tmp_path: Path, content: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    assert columns_of(tmp_path / "a.json", json.dumps(content)) == expected


def test_categories(tmp_path: Path) -> None:
    content = {"Cooking": {"Soup:": ["a", "b"], "Bread": []}, "Sport": {"Ball": ["c"]}}
    rows = columns_of(tmp_path / "a.json", json.dumps(content))
    assert [tuple(row.values()) for row in rows] == [
        ("a", "Cooking", "Soup:"),
        ("b", "Cooking", "Soup:"),
        ("c", "Sport", "Ball"),
    ]
    assert list(rows[0]) == ["text", "category", "subcategory"]


@pytest.mark.parametrize(("name", "cell"), [("a.tsv", 'say "hi"\n- "yes'), ("a.csv", r'say "hi"\n- "yes')])
def test_files_without_a_header_line(tmp_path: Path, name: str, cell: str) -> None:
    separator, written = ("\t", r'say "hi"\n- "yes') if name == "a.tsv" else (",", r'"say ""hi""\n- ""yes"')
    text = f"{written}{separator}007\r\n\u2028 \x0b \x85{separator}\r\n"
    expected = [{"question": cell, "answer": "007"}, {"question": "\u2028 \x0b \x85", "answer": ""}]
    assert columns_of(tmp_path / name, text, header=["question", "answer"]) == expected
    assert Files(str(tmp_path / name), header=["question", "answer"]).rows()[1].origin == f"{tmp_path / name}:2"
    with pytest.raises(ValueError, match=r":1: the row has 2 cells and the header 3$"):
        columns_of(tmp_path / name, text, header=["question", "answer", "rationale"])


def test_a_tsv_with_a_header_line_keeps_backslashes(tmp_path: Path) -> None:
    assert columns_of(tmp_path / "a.tsv", "formula\n\\nabla\n") == [{"formula": "\\nabla"}]


@pytest.mark.parametrize("header", [[], ["a", "a"]])
def test_a_header_names_every_column_once(header: list[str]) -> None:
    with pytest.raises(ValueError, match="header must name every column once"):
        Files("a.tsv", header=header)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_a_cell_of_a_megabyte(tmp_path: Path, name: str) -> None:
    long = "word " * 200_000
    content = {"a.jsonl": json.dumps({"a": long}), "a.json": json.dumps([{"a": long}])}.get(name, f"a\n{long}\n")
    assert columns_of(tmp_path / name, content) == [{"a": long}]


def test_values_stay_as_they_are(tmp_path: Path) -> None:
    rows = columns_of(
        tmp_path / "a.jsonl",
        '{"a": true}\r\n{"a": "True"}\r\n{"a": 27.0}\r\n{"a": "025"}\r\n{"a": null}\r\n{"a": NaN}\r\n{"a": [1, "x"]}',
    )
    assert [row["a"] for row in rows[:5] + rows[6:]] == [True, "True", 27.0, "025", None, [1, "x"]]
    assert [type(row["a"]) for row in rows[:3]] == [bool, str, float]
    assert math.isnan(rows[5]["a"])


def test_missing_cells_of_tables(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": ["x", None], "b": [math.nan, 1.0]}), tmp_path / "a.parquet")
    first, second = (row.columns for row in Files(str(tmp_path / "a.parquet")).rows())
    assert first["a"] == "x" and math.isnan(first["b"]) and second == {"a": None, "b": 1.0}


def test_whole_characters_outside_the_basic_plane_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n{"a": "back\\\\ud83dslash"}\n')
    assert [row.columns["a"] for row in Files(str(tmp_path / "a.jsonl")).rows()] == ["\U0001f600", "back\\ud83dslash"]


def test_saved_data_sets(tmp_path: Path) -> None:
    import datasets

    saved = datasets.Dataset.from_list(RECORDS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select([3])}).save_to_disk(str(tmp_path / "many"))
    assert [row.columns for row in Files(str(tmp_path / "one")).rows()] == RECORDS
    assert [row.columns for row in Files(str(tmp_path / "many"), split="test").rows()] == [RECORDS[3]]
    with pytest.raises(ValueError, match="no split 'dev', it holds test, train"):
        Files(str(tmp_path / "many"), split="dev").rows()


def fill(folder: Path, *names: str) -> list[str]:
    """Write files of one row each, whose text is the name of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"a\n{name}\n" if "sv" in name.lower() else json.dumps({"a": name}) + "\n")
    return list(names)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (None, ["train-00000-of-00001.jsonl", "train-00001-of-00001.jsonl"]),
        ("train", ["train-00000-of-00001.jsonl", "train-00001-of-00001.jsonl"]),
        ("test", ["my_TEST.csv"]),
        ("validation", ["dev.jsonl", "sums.valid.tsv"]),
        ("dev", ["dev.jsonl", "sums.valid.tsv"]),
    ],
)
def test_splits_of_a_folder_are_told_by_file_names(
    tmp_path: Path, split: str | None, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "train-00000-of-00001.jsonl", "train-00001-of-00001.jsonl", "my_TEST.csv", "dev.jsonl")
    fill(tmp_path, "sums.valid.tsv", "contest.jsonl", "notes.md", ".hidden.jsonl")
    with caplog.at_level("INFO"):
        assert [row.columns["a"] for row in Files(str(tmp_path), split=split).rows()] == expected
    (told,) = caplog.messages
    read, left = told.split("not read: ")
    assert f"of the {'validation' if split == 'dev' else split or 'train'} split read" in read
    assert {"contest.jsonl", "notes.md"} <= set(left.split(", ")) and not set(expected) & set(left.split(", "))
    with pytest.raises(ValueError, match="no split 'nosuch', the file names tell test, train, validation$"):
        Files(str(tmp_path), split="nosuch").rows()


def test_one_split_is_read_and_several_without_train_are_refused(tmp_path: Path) -> None:
    assert [row.columns["a"] for row in Files(str(fill(tmp_path / "a", "test-0.jsonl") and tmp_path / "a")).rows()]
    for number, other in enumerate(("dev.jsonl", "sums.jsonl")):
        fill(tmp_path / f"b{number}", "test.jsonl", other)
        with pytest.raises(ValueError, match="tell several splits and none is train .*; name one with split"):
            Files(str(tmp_path / f"b{number}")).rows()


def test_what_a_folder_leaves_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = fill(tmp_path, "B.JSONL", "a.jsonl", "c.ndjson", "e.Csv", "f.TSV")
    fill(tmp_path / "sub", "g.jsonl")
    (tmp_path / "h.Jsonl.GZ").write_bytes(gzip.compress(b'{"a": "h.Jsonl.GZ"}'))
    with caplog.at_level("INFO"):
        assert [row.columns["a"] for row in Files(str(tmp_path)).rows()] == [*names, "h.Jsonl.GZ"]
    (told,) = caplog.messages
    assert told.endswith("6 files read (B.JSONL, a.jsonl, c.ndjson, e.Csv, f.TSV, h.Jsonl.GZ), not read: sub/")


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("a.jsonl", {"split": "train"}, "split 'train' has no effect on a file; leave it out"),
        ("a.jsonl", {"name": "main"}, "name 'main' has no effect on a file"),
        ("a.jsonl", {"header": ["a"]}, r"header \['a'\] has no effect on such a file"),
        ("plain", {"split": "train"}, "no split 'train', for no file name tells a split"),
        ("plain", {"header": ["a"]}, r"b.jsonl: header \['a'\] has no effect"),
        ("saved", {"header": ["a"]}, "has no effect on a saved data set"),
        ("saved", {"split": "test"}, "split 'test' has no effect on a saved data set without splits"),
        ("org/sums:main", {"name": "main"}, "the config is named twice"),
        ("org/sums:main", {"header": ["a"]}, "has no effect on a data set of the hub"),
    ],
)
def test_an_argument_without_effect_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, settings: dict[str, Any], message: str
) -> None:
    import datasets

    fill(tmp_path, "a.jsonl")
    fill(tmp_path / "plain", "b.jsonl")
    datasets.Dataset.from_list([{"a": "1"}]).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        Files(path, **settings).rows()


def test_a_config_is_named_behind_a_colon_or_by_name(tmp_path: Path, hub_clone: str) -> None:
    for source, question in (
        (Files("org/sums:main"), "main train"),
        (Files("org/sums", name="socratic", split="test"), "socratic test"),
        (Files("./org/sums:socratic"), "socratic train"),
        (Files(str(tmp_path / "org" / "sums:main"), split="test"), "main test"),
    ):
        assert [row.columns for row in source.rows()] == [{"question": question, "answer": "2"}]
    with pytest.raises(ValueError, match="subfolders are not read, so name one of them: main/, socratic/"):
        Files("org/sums").rows()
    assert explain_hub_error("a/b", "train", ValueError("Config name is missing.\nPlease pick one: ['x', 'y']\nz")) == (
        "a/b: the data set has several configs (x, y); name one behind a colon: a/b:x"
    )
    with pytest.raises(ValueError, match=r"org/sums:nosuch: .*\(train split\): .*'?nosuch'? not found"):
        Files("org/sums:nosuch").rows()


def test_a_table_whose_first_line_is_a_row_names_the_header(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("1+1?\t2\n1+2?\t3\n")
    with pytest.raises(ValueError, match=r"found the columns 1\+1\?, 2; .*name them with Files' header"):
        InstructionDataModule(tiny_tokenizer(), str(tmp_path / "a.tsv")).setup("fit")
    data = InstructionDataModule(tiny_tokenizer(), Files(str(tmp_path / "a.tsv"), header=["prompt", "completion"]))
    data.setup("fit")
    assert len(data.train_rows) == 2


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}\n\n{"a": "\u2028"}\n')
    rows = Files(str(tmp_path / "a.json")).rows()
    assert [(row.columns["a"], row.origin) for row in rows] == [
        (1, f"{tmp_path / 'a.json'}:1"),
        ("\u2028", f"{tmp_path / 'a.json'}:3"),
    ]
    (tmp_path / "b.json").write_text('{"a": 1}\n{"a": }\n')
    with pytest.raises(ValueError, match=r"b\.json:2: not valid JSON"):
        Files(str(tmp_path / "b.json")).rows()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("depth", [101, 900, 100_000])
def test_deep_nesting_is_one_sentence(tmp_path: Path, name: str, depth: int) -> None:
    deep = '{"a": ' * depth + "1" + "}" * depth
    (tmp_path / name).write_text(deep if name == "a.jsonl" else f"[{deep}]")
    with pytest.raises(ValueError, match="lists and objects are nested more than 100 deep; flatten them$"):
        Files(str(tmp_path / name)).rows()
    (tmp_path / name).write_text(
        json.dumps([{"a": "[{" * 200 + '\\"]'}]).strip("[]") if name == "a.jsonl" else '[{"a": ""}]'
    )
    assert len(Files(str(tmp_path / name)).rows()) == 1  # brackets in a text are no nesting


BROKEN = [
    ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 2}\n', r"a\.jsonl:2: not valid JSON"),
    (
        "a.jsonl",
        b'{"a": 1}\n[1]\n',
        r"a\.jsonl:2: a row must be an object with named columns or a text, this is a list",
    ),
    (
        "a.jsonl",
        b'{"a": 1}\n"text"\n3\n',
        r"a\.jsonl:3: a row must be an object with named columns or a text, this is a int",
    ),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl:2: not UTF-8 text \(byte 0xff\)"),
    ("a.jsonl", b"", r"a\.jsonl: the file holds no rows"),
    ("a.json", b"", r"a\.json: the file holds no rows"),
    ("a.json", b'[{"a": 1},\n {"a" 2}]', r"a\.json:2: not valid JSON"),
    ("a.json", b'["text", [1]]', r"a\.json#1: a row must be an object with named columns or a text, this is a list"),
    ("a.json", b"3", r"a\.json: expected an array of rows, found a int"),
    (
        "a.json",
        b'{"train": [{"a": 1}], "test": [{"a": 2}]}',
        r"a\.json: an object must hold one list of rows, this one has 2: train, test; split",
    ),
    (
        "a.json",
        b'{"a": [1, 2], "b": ["x"], "c": []}',
        r"a\.json: parallel lists must be equally long or empty, these are not: a 2, b 1$",
    ),
    ("a.json", b'{"a": [], "b": []}', r"a\.json: the file holds no rows"),
    (
        "a.json",
        b'{"a": 1}',
        r"a\.json: an object must hold one list of rows, parallel lists, or categories .*; this one has: a$",
    ),
    ("a.json", b'{"a": {"b": ["x"], "c": [1]}}', r"or categories of sub-categories of texts; this one has: a$"),
    ("a.json", b"{}", r"this one has: nothing$"),
    ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv:3: the row has 1 cells and the header 2"),
    ("a.csv", b"a,b\n1,2,3\n", r"a\.csv:2: the row has 3 cells and the header 2"),
    ("a.csv", b"a,b,a\n1,2,3\n", r"a\.csv:1: the header names 'a' twice"),
    ("a.tsv", b"a\tb\n1\t2\n3\t\xe9\n", r"a\.tsv:3: not UTF-8 text \(byte 0xe9\)"),
    ("a.csv", b'a,b\n1,"2\n3,4\n', r"a\.csv:2: not valid CSV"),
    ("a.csv", b"a,b\n1,\xe9\n", r"a\.csv:2: not UTF-8"),
    (
        "a.tsv",
        b"a\tb\nc\n",
        r"a\.tsv:2: the row has 1 .*; if the file has no line of column names, name them with Files' header",
    ),
    ("a.tsv", b"a\ta\nc\td\n", r"names 'a' twice.* name them with Files' header, such as \[prompt, completion\]$"),
    ("a.csv", b"a,b\n", r"a\.csv: the file holds no rows"),
    ("a.parquet", b"no parquet", r"a\.parquet: not a readable parquet file"),
    ("a.arrow", b"no arrow", r"a\.arrow: not a readable arrow file"),
    ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: not a complete gzip file"),
    (
        "a.jsonl.gz",
        gzip.compress(b'{"a": 1}', mtime=0)[:12] + b"\xff\xff\xff\xff" * 4,
        r"a\.jsonl\.gz: not a complete gzip file",
    ),
    ("a.tsv", b"a\tb\n1\n", r"a\.tsv:2: the row has 1 cells and the header 2"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\\ud83d"}\n', r"a\.jsonl:2: the text holds half of a character"),
    ("a.json", b'[{"a": 1}, {"a": ["\\uDE00 x"]}]', r"a\.json:1: the text holds half of a character"),
    ("a.txt", b"text", r"a\.txt: unknown kind of file, expected one that ends in \.jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_files_say_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        Files(str(tmp_path / name)).rows()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "path", ["missing.jsonl", "./missing", "/no/such/place", "~/no-such-place", "a/b/c", "missing.jsonl.gz"]
)
def test_a_missing_path_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        Files(path).rows()


@pytest.mark.parametrize(("name", "needs"), [("Chains", "num_examples"), ("ThinkingFusion", "thinking, plain")])
def test_a_source_without_its_arguments_is_not_looked_for_on_the_hub(tmp_path: Path, name: str, needs: str) -> None:
    first = needs.partition(",")[0]
    said = f"^{name} is a source that needs {needs}: write --data.train {name} --data.train.{first} ..."
    rows = Addition(4)
    for train, val in ((name, None), (rows, name)):
        with pytest.raises(ValueError, match=said):
            VerifiableDataModule(tiny_tokenizer(), train, val).setup("fit")
    (tmp_path / name).mkdir()
    with contextlib.chdir(tmp_path), pytest.raises(ValueError, match="the folder holds no file"):
        read_rows(name)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the folder holds no file that ends in"):
        Files(str(tmp_path)).rows()


def test_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"^nobody/nothing: neither a file or folder here nor loadable from the hub \(train split\): "
    ) as raised:
        Files("nobody/nothing").rows()
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the public GSM8K files are not here")
def test_gsm8k() -> None:
    tokenizer = tiny_tokenizer()
    for name, count, first, last in (("train", 7473, "72", "50"), ("test", 919, "18", "56")):
        examples = [
            verifiable_example(row, Reading("verifiable")) for row in Files(str(GSM8K / f"{name}.jsonl")).rows()
        ]
        assert len(examples) == count
        raw = [json.loads(line)["answer"] for line in (GSM8K / f"{name}.jsonl").read_bytes().split(b"\n") if line]
        assert [example.answer for example in examples] == [
            text[text.rindex("####") + 4 :].strip().replace(",", "") for text in raw
        ]
        assert all(str(int(example.answer or "")) == example.answer for example in examples)
        assert (examples[0].answer, examples[-1].answer) == (first, last)
        encode_prompt(tokenizer, examples[-1].prompt, examples[-1].origin)
