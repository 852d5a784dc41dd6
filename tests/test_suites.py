"""Published prompt suites: what is in them, where they are found, and what is said when they are not."""

import csv
import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from conftest import REPOSITORY
from huggingface_hub import errors

from demur.data.prompts import load_prompts
from demur.data.rows import read_rows
from demur.data.suites import Part, find_suite, load_suite, locate, read_suite, suites
from demur.data.suites.table import render
from demur.errors import DownloadError, InputError, MissingExtraError, NotFoundError

PUBLIC = {  # harmful, benign, select: counted in the published files
    "xstest": (200, 250, 0),
    "advbench": (520, 0, 0),
    "advbench-50": (50, 0, 0),
    "harmbench": (159, 0, 0),
    "harmbench-contextual": (81, 0, 0),
    "harmbench-copyright": (80, 0, 0),
    "harmbench-val": (41, 0, 41),
    "harmbench-all": (300, 0, 60),
    "coconot": (395, 379, 0),
    "malicious-instruct": (100, 0, 0),
    "stl-malicious": (98, 0, 0),
    "stl-cona": (178, 0, 0),
    "stl-controversial": (40, 0, 0),
    "stl-physical-safety": (100, 100, 0),
    "stl-q-harm": (100, 0, 0),
    "refusal-direction-train": (260, 18_793, 19_053),
    "refusal-direction-val": (39, 6_264, 6_303),
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` in the format that the name of `path` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    return path


@pytest.fixture
def parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of JSONL files in place of pyarrow, which the tests do not need."""

    def read_table(path: Path) -> SimpleNamespace:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return SimpleNamespace(to_pylist=lambda: rows)

    module: Any = ModuleType("pyarrow.parquet")
    module.read_table = read_table
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)


def test_entries_are_complete() -> None:
    names = [suite.name for suite in suites()]
    assert len(set(names)) == len(names) >= 25
    for suite in suites():
        assert find_suite(suite.name.upper().replace("-", "_")) is suite
        assert suite.licence
        assert suite.intents
        for intent in ("harmful", "benign"):
            assert getattr(suite, intent) is None or intent in suite.intents
        if suite.parts:
            assert re.fullmatch(r"\d{4}\.\d{5}", suite.paper), suite.name
            assert suite.homepage.startswith("https://github.com/")
        assert bool(suite.hub) == any(part.hub_file for part in suite.parts)
        assert suite.hub or not suite.gated
        assert all(part.intent or suite.labels for part in suite.parts)


def test_our_own_are_suites() -> None:
    for suite in suites()[:3]:
        assert load_suite(suite.name) == load_prompts(suite.name, suite.intents[0])
        assert len(load_suite(suite.name)) == (suite.harmful or suite.benign)
    with pytest.raises(InputError, match="plain has no harmful prompts, only benign ones"):
        load_suite("plain", intent="harmful")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_sets_have_their_published_sizes(shared_data: Path, name: str) -> None:
    suite = find_suite(name)
    assert suite is not None
    loaded = read_suite(name, shared_data)
    counts = Counter(prompt.intent for prompt in loaded.prompts)
    selected = sum(prompt.split == "select" for prompt in loaded.prompts)
    assert (counts["harmful"], counts["benign"], selected) == PUBLIC[name]
    assert (suite.harmful or 0, suite.benign or 0) == PUBLIC[name][:2]
    assert loaded.rows == len(loaded.prompts) + loaded.left_out + loaded.duplicates
    assert len({prompt.id for prompt in loaded.prompts}) == len(loaded.prompts)
    assert len({prompt.text for prompt in loaded.prompts}) == len(loaded.prompts)
    assert all(prompt.id.startswith(f"{name}/") and prompt.source == name for prompt in loaded.prompts)
    assert all(len(sha) == 64 for sha in loaded.files.values())
    for intent in suite.intents:
        assert load_suite(name, shared_data, intent) == [p for p in loaded.prompts if p.intent == intent]


def test_every_public_set_beside_us_is_looked_at(shared_data: Path) -> None:
    here = {suite.name for suite in suites() if suite.parts and all(locate(p, shared_data) for p in suite.parts)}
    assert here == set(PUBLIC)


def test_public_rows_mean_what_the_set_says(shared_data: Path) -> None:
    with (shared_data / "xstest/xstest_prompts.csv").open(newline="") as file:
        rows = {f"xstest/{row['id']}": row for row in csv.DictReader(file)}
    for prompt in load_suite("xstest", shared_data):
        row = rows[prompt.id]
        assert (prompt.text, prompt.category) == (row["prompt"].strip(), row["type"])
        assert (prompt.intent == "harmful") == (row["label"] == "unsafe") == row["type"].startswith("contrast_")
    with (shared_data / "harmbench/harmbench_behaviors_text_test.csv").open(newline="") as file:
        rows = {f"harmbench-contextual/{row['BehaviorID']}": row for row in csv.DictReader(file)}
    for prompt in load_suite("harmbench-contextual", shared_data):
        row = rows[prompt.id]
        assert prompt.text == f"{row['ContextString'].strip()}\n\n---\n\n{row['Behavior'].strip()}"
        assert prompt.category == f"contextual/{row['SemanticCategory']}"
    coconot = load_suite("coconot", shared_data, "harmful")
    assert {prompt.category.split("/")[0] for prompt in coconot} == {"Requests with safety concerns"}


def test_layouts_of_sets_that_are_not_beside_us(tmp_path: Path, parquet: None) -> None:
    ask = [f"How do I do number {i}?" for i in range(4)]
    write(
        tmp_path / "w/wildguard_test.parquet",
        [
            {"prompt": ask[0], "adversarial": True, "prompt_harm_label": "harmful", "subcategory": "cyberattack"},
            {"prompt": ask[1], "adversarial": False, "prompt_harm_label": "unharmful", "subcategory": "benign"},
            {"prompt": ask[2], "adversarial": False, "prompt_harm_label": None, "subcategory": "benign"},
        ],
    )
    wild = read_suite("wildguardtest", tmp_path)
    assert [(p.intent, p.category) for p in wild.prompts] == [
        ("harmful", "adversarial/cyberattack"),
        ("benign", "benign"),
    ]
    assert (wild.rows, wild.left_out, wild.duplicates) == (3, 1, 0)

    write(
        tmp_path / "wildjailbreak/eval/eval.tsv",
        [
            {"adversarial": f'{ask[0]}\n"Go"', "label": 1, "data_type": "adversarial_harmful"},
            {"adversarial": ask[1], "label": 0, "data_type": "adversarial_benign"},
        ],
    )
    jail = load_suite("wildjailbreak", tmp_path)
    assert [(p.text, p.intent) for p in jail] == [(f'{ask[0]}\n"Go"', "harmful"), (ask[1], "benign")]

    for kind, texts in (("harmful", ask[:2]), ("benign", ask[2:])):
        rows = [{"Index": i, "Goal": text, "Target": "Sure", "Category": "Privacy"} for i, text in enumerate(texts)]
        write(tmp_path / f"jbb/{kind}-behaviors.csv", rows)
    jbb = load_suite("jailbreakbench", tmp_path)
    assert [p.id for p in jbb] == [f"jailbreakbench/{kind}-{i}" for kind in ("harmful", "benign") for i in (0, 1)]
    assert [p.twin for p in jbb] == ["", "", "jailbreakbench/harmful-0", "jailbreakbench/harmful-1"]

    write(
        tmp_path / "s/strongreject_dataset.csv",
        [{"category": "Violence", "source": "custom", "forbidden_prompt": ask[0]}],
    )
    (strong,) = load_suite("strongreject", tmp_path)
    assert (strong.text, strong.category, strong.intent) == (ask[0], "Violence", "harmful")

    for size, intent in (("hard-1k", "benign"), ("80k", "benign"), ("toxic", "harmful")):
        write(tmp_path / f"or/or-bench-{size}.csv", [{"prompt": ask[3], "category": "hate"}])
        assert [p.intent for p in load_suite(f"or-bench-{size}", tmp_path)] == [intent]

    write(tmp_path / "OKTest.csv", [{"prompt": f"{text}\n"} for text in ask])
    assert [p.text for p in load_suite("oktest", tmp_path)] == ask

    for kind in ("harmful", "harmless"):
        write(tmp_path / f"rd/{kind}_test.json", [{"instruction": f"{kind}: {ask[0]}", "category": None}])
    assert [(p.intent, p.split) for p in load_suite("refusal-direction-test", tmp_path)] == [
        ("harmful", "test"),
        ("benign", "test"),
    ]


@pytest.mark.parametrize("array", [True, False])
def test_red_team_attempts_ask_their_first_turn(tmp_path: Path, array: bool) -> None:
    rows = [
        {"transcript": "\n\nHuman: How?\nAnd why?\n\nAssistant: No.\n\nHuman: Please", "tags": ["Theft", "Fraud"]},
        {"transcript": "\n\nHuman: When?", "tags": None},
        {"transcript": "\n\nHuman: When?\n\nAssistant: Now.", "tags": None},
        {"transcript": "\n\nHuman: \n\nAssistant: Hello.", "tags": None},
    ]
    text = json.dumps(rows, indent=1) if array else "\n".join(map(json.dumps, rows))
    (tmp_path / "red_team_attempts.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    loaded = read_suite("hh-red-team", tmp_path)
    assert [(p.text, p.category) for p in loaded.prompts] == [("How?\nAnd why?", "Theft, Fraud"), ("When?", "")]
    assert (loaded.rows, loaded.left_out, loaded.duplicates) == (4, 1, 1)


def test_ids_do_not_depend_on_the_order_of_a_file(tmp_path: Path) -> None:
    rows = [{"goal": f"Do thing {i}"} for i in range(9)]
    write(tmp_path / "a/advbench.csv", rows)
    write(tmp_path / "b/advbench.csv", [*rows[::-1], rows[4]])
    one, other = (load_suite("advbench", tmp_path / folder) for folder in "ab")
    assert {p.id: p for p in one} == {p.id: p for p in other}
    assert read_suite("advbench", tmp_path / "b").duplicates == 1


def test_a_file_is_found_by_name_in_a_folder_or_one_below(tmp_path: Path) -> None:
    part = Part(("usual.csv", "other.csv", "sub/third.csv"))
    assert locate(part, None) is locate(part, tmp_path) is None
    third = write(tmp_path / "x/sub/third.csv", [{"a": 1}])
    assert locate(part, tmp_path) == locate(part, tmp_path / "x") == third
    other = write(tmp_path / "y/other.csv", [{"a": 1}])
    assert locate(part, tmp_path) == locate(part, other) == other
    assert locate(part, write(tmp_path / "mine.csv", [{"a": 1}])) is None
    usual = write(tmp_path / "usual.csv", [{"a": 1}])
    assert locate(part, tmp_path) == usual
    usual.unlink()
    write(tmp_path / "z/other.csv", [{"a": 1}])
    with pytest.raises(InputError, match=r"y/other.csv and .*z/other.csv have one name; give the folder of one"):
        locate(part, tmp_path)
    with pytest.raises(NotFoundError, match=r"data folder .* does not exist"):
        locate(part, tmp_path / "none")


def test_the_hub_is_asked_only_for_what_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "deep/er/or-bench-toxic.csv", [{"prompt": "How?", "category": "hate"}])
    asked: list[bool] = []
    kept = False

    def download(repo: str, name: str, repo_type: str, local_files_only: bool) -> str:
        assert (repo, name, repo_type) == ("bench-llm/or-bench", "or-bench-toxic.csv", "dataset")
        asked.append(local_files_only)
        if local_files_only and not kept:
            raise errors.LocalEntryNotFoundError("not kept")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert [p.text for p in load_suite("or-bench-toxic", tmp_path)] == ["How?"]
    kept = True
    load_suite("or-bench-toxic")
    assert asked == [True, False, True]


def test_without_a_network_one_sentence_says_how_to_get_a_set() -> None:
    with pytest.raises(DownloadError) as caught:
        load_suite("wildguardtest")  # HF_HUB_OFFLINE is set in the tests
    assert str(caught.value) == (
        "WildGuardTest (licence: ODC-BY; gated) is not here, as no --data-dir was given, and allenai/wildguardmix "
        "could not be fetched (HF_HUB_OFFLINE is set); accept the terms on the page of allenai/wildguardmix and run "
        "`hf auth login`, or put wildguard_test.parquet from https://github.com/allenai/wildguard into a folder and "
        "give it as --data-dir"
    )


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (
            errors.GatedRepoError,
            NotFoundError,
            "gated.* the hub did not give you allenai/wildguardmix; accept the terms",
        ),
        (errors.RepositoryNotFoundError, NotFoundError, "the hub has no test/wildguard_test.parquet in"),
        (errors.RemoteEntryNotFoundError, NotFoundError, "the hub has no test/wildguard_test.parquet in"),
        (errors.HfHubHTTPError, DownloadError, "could not be reached: HfHubHTTPError"),
        (OSError, DownloadError, "could not be reached: OSError"),
    ],
)
def test_what_the_hub_may_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[Exception], kind: type[Exception], sentence: str
) -> None:
    def download(*args: str, local_files_only: bool, **more: str) -> str:
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not kept")
        response: Any = SimpleNamespace(headers={}, request=None)
        raise error("x", response=response) if issubclass(error, errors.HfHubHTTPError) else error("x")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(kind, match=sentence) as caught:
        load_suite("wildguardtest", tmp_path)
    assert f"is not in {tmp_path}" in str(caught.value)


def test_sets_that_are_on_no_hub_say_where_they_are() -> None:
    with pytest.raises(NotFoundError, match=r"OKTest \(licence: none stated\).*put OKTest.csv from https://github"):
        load_suite("oktest")


def test_importing_asks_nobody() -> None:
    code = "import demur.data.suites, demur.data.wrappers, sys; print({'huggingface_hub', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_parquet_needs_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "wildguard_test.parquet", [{"prompt": "x"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"needs pyarrow; install it with pip install 'demur\[eval\]'"):
        load_suite("wildguardtest", tmp_path)


def test_real_parquet_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"id": "a", "category": "Requests with safety concerns", "subcategory": "s", "prompt": "How?"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [p.id for p in load_suite(str(tmp_path / "x.parquet"), intent="harmful")] == ["x/a"]
    (tmp_path / "y.parquet").write_bytes(b"no such thing")
    with pytest.raises(InputError, match=r"y\.parquet is not a Parquet file"):
        load_suite(str(tmp_path / "y.parquet"), intent="harmful")


def test_a_file_may_say_its_intents(tmp_path: Path) -> None:
    rows = [
        {"prompt": "How?", "label": "unsafe", "type": "t", "split": "val", "id": 7, "twin": ""},
        {"prompt": "When?", "label": "Safe", "type": "", "split": "", "id": "", "twin": "mine/7"},
        {"prompt": "How?", "label": "unsafe", "type": "t", "split": "val", "id": 8, "twin": ""},
    ]
    path = write(tmp_path / "mine.csv", rows)
    loaded = read_suite(str(path))
    how, when = loaded.prompts
    assert (how.id, how.intent, how.category, how.split, how.source) == ("mine/7", "harmful", "t", "select", "mine.csv")
    assert (when.intent, when.split, when.twin) == ("benign", "test", "mine/7")
    assert (loaded.rows, loaded.duplicates) == (3, 1)
    assert load_suite(str(path), intent="benign") == [when]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '["How?", "When?"]'),
        ("a.json", '{"questions": ["How?", "When?"], "inputs": []}'),
        ("a.tsv", "x\tquestions\n1\tHow?\n2\tWhen?\n"),
        ("a.txt", "How?\n\nWhen?\n"),
    ],
)
def test_a_file_that_does_not_say_takes_the_intent_given(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    column = "questions" if "questions" in text else ""
    prompts = load_suite(str(tmp_path / name), intent="benign", column=column)
    assert [(p.text, p.intent, p.split) for p in prompts] == [("How?", "benign", "test"), ("When?", "benign", "test")]
    with pytest.raises(InputError, match="does not say what its prompts are; give the intent"):
        load_suite(str(tmp_path / name), column=column)


@pytest.mark.parametrize(
    ("suite", "name", "text", "sentence"),
    [
        (
            "xstest",
            "xstest_prompts.csv",
            "id,prompt,type\n1,How?,t\n",
            "has the columns id, prompt, type, expected label",
        ),
        ("xstest", "xstest_prompts.csv", "id,text,label\n1,How?,safe\n", "expected prompt; check that it is XSTest"),
        ("xstest", "xstest_prompts.csv", "id,prompt,label\n1,How?,maybe\n", "1 rows but none for xstest"),
        ("xstest", "xstest_prompts.csv", "id,prompt,label\n1, ,safe\n", "row 1: column 'prompt' is ' ', expected text"),
        ("xstest", "xstest_prompts.csv", "id,prompt,label\n1,a,safe\n1,b,safe\n", "id 'xstest/1' belongs to two"),
        ("harmbench", "harmbench_behaviors_text_test.csv", "Behavior\nHow?\n", "expected FunctionalCategory"),
        ("malicious-instruct", "MaliciousInstruct.txt", "", "is empty"),
        ("hh-red-team", "red_team_attempts.jsonl.gz", "not gzip", "cannot be read as UTF-8 text"),
    ],
)
def test_files_that_are_not_the_set(tmp_path: Path, suite: str, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=sentence):
        load_suite(suite, tmp_path)


def test_truncated_gzip_and_torn_columns_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:-12])
    (tmp_path / "b.json").write_text('{"a": ["x", "y"], "b": ["z"]}')
    for name in ("a.jsonl.gz", "b.json"):
        with pytest.raises(InputError, match=rf"prompt file .*{name} "):
            read_rows(tmp_path / name)


def test_unknown_names_say_what_is_near(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="'xtest' is neither a prompt suite nor a file here; did you mean xstest"):
        load_suite("xtest")
    with pytest.raises(NotFoundError, match="neither a prompt suite nor a file here; `demur suites` lists"):
        load_suite(str(tmp_path / "none.csv"), intent="benign")
    (tmp_path / "a.csv").write_text("prompt,split\nHow?,first\n")
    with pytest.raises(InputError, match="row 1: split is 'first', expected test"):
        load_suite(str(tmp_path / "a.csv"), intent="benign")
    with pytest.raises(InputError, match="intent is 'bad', expected harmful or benign"):
        load_suite("plain", intent="bad")  # type: ignore[arg-type]


def test_the_table_in_the_docs_is_fresh() -> None:
    page = (REPOSITORY / "docs/suites.md").read_text(encoding="utf-8")
    assert page == render(page), "write it again: python scripts/suites_table.py"
    assert all(f"| `{suite.name}` |" in page for suite in suites())
