"""Benchmark data from a folder, in lm-eval's own prompts."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import lm_eval.tasks
from benchmark_data import COLOURS, jsonl, write_benchmarks

from demur.errors import InputError, NotFoundError
from demur.eval.tasks import SOURCES, find_files, load_tasks, local_dataset, source_of, write_overrides


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_benchmarks(tmp_path)
    return tmp_path


def prompts(task: Any, shots: int | None = None) -> list[str]:
    """What the model is shown for each document."""
    count = task.config.num_fewshot or 0 if shots is None else shots
    return [task.fewshot_context(doc, num_fewshot=count) for doc in task.eval_docs]


def test_prompts_are_lm_evals(data: Path) -> None:
    tasks = load_tasks(
        ["mmlu_anatomy", "truthfulqa", "gsm8k", "gsm8k_cot", "piqa", "arc_easy", "hellaswag", "wikitext"], data
    )
    assert list(tasks) == [
        *("mmlu_anatomy", "truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_gen"),
        *("gsm8k", "gsm8k_cot", "piqa", "arc_easy", "hellaswag", "wikitext"),
    ]
    lines = [
        f'What is {split} {i} of "anatomy", please?\nA. red\nB. blue\nC. green\nD. yellow\nAnswer:{answer}'
        for split, i, answer in [*(("dev", i, f" {'ABCD'[i % 4]}\n\n") for i in range(5)), ("test", 1, "")]
    ]
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    assert prompts(tasks["mmlu_anatomy"])[1] == head + "".join(lines)
    assert prompts(tasks["piqa"])[0] == "Question: make cake 0\nAnswer:"
    assert prompts(tasks["truthfulqa_mc2"])[2].endswith("\n\nQ: What colour is cake 2?\nA:")
    assert prompts(tasks["gsm8k"])[2].count("Question: ") == 6
    assert prompts(tasks["gsm8k_cot"])[2].endswith("Q: What is 2 and 2?\nA:")
    assert prompts(tasks["arc_easy"]) == ["Question: Colour 0?\nAnswer:", "Question: Colour 1?\nAnswer:"]
    targets = {
        name: [task.doc_to_choice(doc)[task.doc_to_target(doc)] for doc in task.eval_docs]
        for name, task in tasks.items()
        if name in ("mmlu_anatomy", "piqa", "arc_easy", "hellaswag", "truthfulqa_mc1")
    }
    assert targets["mmlu_anatomy"] == ["A", "B", "C", "D"]
    assert targets["piqa"] == ["mix it ", "ask for a blue one", "ask for a blue one", "mix it mix it mix it mix it "]
    assert targets["arc_easy"] == ["blue", "blue"]
    assert targets["hellaswag"] == ["eats green"]
    assert targets["truthfulqa_mc1"] == ["It is red."] * 3
    assert tasks["truthfulqa_gen"].eval_docs[0]["incorrect_answers"] == ["Blue.", "It is blue."]
    assert [doc["page"].strip().split(" \n")[0] for doc in tasks["wikitext"].eval_docs] == ["= Cake =", "= Blue ="]


def test_few_shot_examples_are_the_same_each_time(data: Path) -> None:
    first, second = (prompts(load_tasks(["gsm8k"], data)["gsm8k"]) for _ in range(2))
    assert first == second


def test_the_hubs_files_and_the_authors_give_the_same(data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    import pyarrow
    import pyarrow.parquet

    hub = tmp_path_factory.mktemp("hub")
    names = ["mmlu_virology", *SOURCES]
    names.remove("arc_challenge")
    for name in names:
        files = find_files(source_of(name), data)
        assert files is not None
        published = local_dataset(name, {split: list(map(str, paths)) for split, paths in files.items()})
        where = {"truthfulqa_mc": "truthfulqa/multiple_choice", "truthfulqa_gen": "truthfulqa/generation"}
        folder = hub / where.get(name, name.replace("mmlu_", "mmlu/"))
        folder.mkdir(parents=True)
        for split, rows in published.items():
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(rows.to_list()), folder / f"{split}-00000-of-00001.parquet"
            )
        copies = find_files(source_of(name), hub)
        assert copies is not None
        assert copies.keys() == files.keys()
        again = local_dataset(name, {split: list(map(str, paths)) for split, paths in copies.items()})
        assert {split: rows.to_list() for split, rows in again.items()} == {
            split: rows.to_list() for split, rows in published.items()
        }


def test_mmlu_without_a_header_and_with_letters(tmp_path: Path) -> None:
    path = tmp_path / "anatomy_test.csv"
    path.write_text('"Which, please?",red,blue,green,yellow,C\nWhat?,0,1,2,3,A\n')
    assert source_of("mmlu_anatomy").read(path) == [
        {"question": "Which, please?", "choices": list(COLOURS), "answer": 2},
        {"question": "What?", "choices": list("0123"), "answer": 0},
    ]


def test_lm_evals_command_line_can_use_the_folder(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "overrides"
    folder.mkdir()
    assert write_overrides(folder, ["piqa", "unheard_of", "mmlu_virology"], data) == ["piqa", "mmlu_virology"]
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    assert sorted(manager.load(["piqa", "mmlu_virology"])["tasks"]) == ["mmlu_virology", "piqa"]


@pytest.mark.parametrize(
    ("file", "text", "task", "message"),
    [
        ("mmlu/test/anatomy_test.csv", "What?,red,blue,green,E\n", "mmlu_anatomy", "row 1 has 5 columns"),
        ("mmlu/test/anatomy_test.csv", "What?,red,blue,green,gold,5\n", "mmlu_anatomy", "A to D or 0 to 3"),
        ("piqa/valid-labels.lst", "0\n1\n", "piqa", "2 labels for the 4 rows"),
        (
            "truthfulqa/mc_task.json",
            json.dumps([{"question": "?"}]),
            "truthfulqa_mc1",
            "mc1_targets.*get the file again",
        ),
        ("gsm8k/train.jsonl", "{", "gsm8k", "line 1 is not JSON"),
    ],
)
def test_a_damaged_file_is_named(data: Path, file: str, text: str, task: str, message: str) -> None:
    (data / file).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_tasks([task], data)
    assert Path(file).name.split(".")[0] in str(caught.value)


def test_data_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"piqa is not in .*put valid\.jsonl into piqa/"):
        load_tasks(["piqa"], tmp_path)
    with pytest.raises(NotFoundError, match=r"as no --data-dir was given.*put dev/anatomy_dev"):
        load_tasks(["mmlu_anatomy"])
    with pytest.raises(NotFoundError, match="does not exist"):
        load_tasks(["piqa"], tmp_path / "gone")


def test_an_unknown_task(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    short = partial(lm_eval.tasks.TaskManager, include_path=None)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **given: short(**{**given, "include_defaults": False}))
    with pytest.raises(InputError, match="no task 'mmmlu'"):
        load_tasks(["mmmlu"], data)


def test_the_data_folder_may_be_the_sets_own_but_no_other_sets(data: Path) -> None:
    assert len(load_tasks(["gsm8k"], data / "gsm8k")["gsm8k"].eval_docs) == 3
    assert find_files(source_of("arc_easy"), data / "gsm8k") is None


def test_a_split_that_is_only_named_is_not_looked_for(tmp_path: Path) -> None:
    jsonl(tmp_path / "piqa" / "validation.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}])
    assert prompts(load_tasks(["piqa"], tmp_path)["piqa"]) == ["Question: g\nAnswer:"]


def test_the_shared_data_sets_are_read_whole(shared_data: Path) -> None:
    sizes = {
        "gsm8k": {"train": 7473, "test": 1319},
        "truthfulqa_mc": {"validation": 817},
        "truthfulqa_gen": {"validation": 817},
        "piqa": {"validation": 1838},
        "wikitext": {"test": 62, "validation": 60},
    }
    for name, expected in sizes.items():
        source = source_of(name)
        files = find_files(source, shared_data)
        assert files is not None
        assert {split: sum(len(source.read(path)) for path in paths) for split, paths in files.items()} == expected
    subjects = [path.stem.removesuffix("_test") for path in sorted((shared_data / "mmlu" / "test").glob("*.csv"))]
    total = 0
    for subject in subjects:
        source = source_of(f"mmlu_{subject}")
        files = find_files(source, shared_data)
        assert files is not None
        assert len(source.read(files["dev"][0])) == 5
        total += len(source.read(files["test"][0]))
    assert (len(subjects), total) == (57, 14042)
