"""Benchmark tasks of lm-eval on data from a folder, or from the hub where the folder does not have it.

lm-eval's own prompts, few-shot rules and metrics are used: for every task a short file is written that includes the
one lm-eval ships and only says that `local_dataset` reads the data. `write_overrides` makes a folder of such files,
which lm-eval's own command line takes too (`--include_path FOLDER`). Needs the extra `demur[eval]`.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from demur import progress
from demur.data.rows import Row, read_table
from demur.errors import DemurError, InputError, NotFoundError

_SEED = 1234
"""lm-eval's default seed of few-shot examples."""


class Source(NamedTuple):
    """A data set and how people keep it: as its authors publish it, or as the hub does."""

    folders: tuple[str, ...]
    """Names of its folder in a data folder."""
    files: Mapping[str, tuple[str, ...]]
    """For each split what its file may be called, as patterns; several files that one matches are its parts."""
    needs: tuple[str, ...]
    """Splits without which it cannot be used."""
    read: Callable[[Path], list[Row]] = read_table
    """From a file to the rows that lm-eval's prompts expect."""


def _mmlu(path: Path) -> list[Row]:
    """Question, four choices and the answer, as a number from 0 or a letter; with a header or without."""
    if path.suffix != ".csv":
        return read_table(path)
    rows = []
    lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
    for number, line in enumerate(lines, start=1):
        if number == 1 and line[:1] == ["question"]:
            continue
        answer = "ABCD".find(line[5]) if len(line) == 6 and line[5] in "ABCD" else _index(line[5:])
        if len(line) != 6 or not 0 <= answer < 4:
            raise InputError(
                f"{path} row {number} has {len(line)} columns and the answer {line[5:]}; expected a question, four "
                "choices and the answer, A to D or 0 to 3"
            )
        rows.append({"question": line[0], "choices": line[1:5], "answer": answer})
    return rows


def _index(cells: list[str]) -> int:
    return int(cells[0]) if cells and cells[0].isdigit() else -1


def _truthfulqa_mc(path: Path) -> list[Row]:
    """`mc1_targets`, `mc2_targets`: a label of 0 or 1 by choice, or lists of both."""
    return [
        {"question": row["question"], **{name: _targets(row[name]) for name in ("mc1_targets", "mc2_targets")}}
        for row in read_table(path)
    ]


def _targets(given: dict[str, Any]) -> dict[str, Any]:
    return given if "labels" in given else {"choices": list(given), "labels": list(given.values())}


def _truthfulqa_gen(path: Path) -> list[Row]:
    """One column of correct and one of incorrect answers, each divided by semicolons; or lists of them."""
    return [
        row
        if "best_answer" in row
        else {
            "question": row["Question"],
            "best_answer": row["Best Answer"],
            "correct_answers": _divided(row["Correct Answers"]),
            "incorrect_answers": _divided(row["Incorrect Answers"]),
        }
        for row in read_table(path)
    ]


def _divided(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def _piqa(path: Path) -> list[Row]:
    """Labels stand in a file of their own, a line for each row, or in the rows."""
    rows = read_table(path)
    if "label" in rows[0]:
        return rows
    beside = path.with_name(f"{path.stem}-labels.lst")
    labels = beside.read_text(encoding="utf-8").split() if beside.is_file() else []
    if len(labels) != len(rows) or set(labels) - {"0", "1"}:
        raise InputError(
            f"{beside} holds {len(labels)} labels for the {len(rows)} rows of {path.name}; expected 0 or 1"
        )
    return [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]


def _arc(path: Path) -> list[Row]:
    """The question with its choices inside it, as published, or beside it, as on the hub."""
    return [
        row
        if isinstance(row["question"], str)
        else {
            "id": row["id"],
            "question": row["question"]["stem"],
            "choices": {key: [choice[key] for choice in row["question"]["choices"]] for key in ("text", "label")},
            "answerKey": row["answerKey"],
        }
        for row in read_table(path)
    ]


def _wikitext(path: Path) -> list[Row]:
    """Pages, each from its title (` = Title = `) on. Text with `<unk>` in it gives other numbers than the raw text."""
    if path.suffix in (".parquet", ".jsonl"):
        return read_table(path)
    pages: list[list[str]] = [[]]
    for line in path.read_text(encoding="utf-8").split("\n"):
        title = line.strip()
        if title.startswith("= ") and title.endswith(" =") and not title.startswith("= ="):
            pages.append([])
        pages[-1].append(line)
    return [{"page": "\n".join(page)} for page in pages if "".join(page).strip()]


def _splits(**names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Every split may also be kept as the hub keeps it."""
    return {split: (*own, f"{split}.jsonl", f"{split}-*.parquet") for split, own in names.items()}


SOURCES: dict[str, Source] = {
    "gsm8k": Source(
        ("gsm8k",),
        _splits(train=("train.jsonl", "main/train-*.parquet"), test=("test.jsonl", "main/test-*.parquet")),
        ("train", "test"),
    ),
    "truthfulqa_mc": Source(
        ("truthfulqa", "truthfulqa/multiple_choice", "truthful_qa"),
        _splits(validation=("mc_task_v1_817.json", "mc_task.json", "multiple_choice/validation-*.parquet")),
        ("validation",),
        _truthfulqa_mc,
    ),
    "truthfulqa_gen": Source(
        ("truthfulqa", "truthful_qa"),
        _splits(validation=("TruthfulQA_v1_817.csv", "TruthfulQA.csv", "generation/validation-*.parquet")),
        ("validation",),
        _truthfulqa_gen,
    ),
    "piqa": Source(("piqa",), _splits(train=(), validation=("valid.jsonl",)), ("validation",), _piqa),
    "arc_easy": Source(
        ("arc_easy", "ARC-Easy", "ai2_arc/ARC-Easy"),
        _splits(train=("ARC-Easy-Train.jsonl",), test=("ARC-Easy-Test.jsonl",)),
        ("test",),
        _arc,
    ),
    "arc_challenge": Source(
        ("arc_challenge", "ARC-Challenge", "ai2_arc/ARC-Challenge"),
        _splits(train=("ARC-Challenge-Train.jsonl",), test=("ARC-Challenge-Test.jsonl",)),
        ("test",),
        _arc,
    ),
    "hellaswag": Source(
        ("hellaswag",),
        _splits(train=("hellaswag_train.jsonl",), validation=("hellaswag_val.jsonl", "data/validation-*.parquet")),
        ("validation",),
    ),
    "wikitext": Source(
        ("wikitext", "webtext", "wikitext-2-raw-v1"),
        _splits(test=("wiki.test.raw", "wikitext2_test.txt"), validation=("wiki.valid.raw", "wikitext2_valid.txt")),
        ("test",),
        _wikitext,
    ),
}
"""Data sets by name, all but those of MMLU, whose subjects are alike."""
_SHIPPED = {
    "gsm8k": ("gsm8k/gsm8k.yaml", "gsm8k"),
    "gsm8k_cot": ("gsm8k/gsm8k-cot.yaml", "gsm8k"),
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1.yaml", "truthfulqa_mc"),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "truthfulqa_mc"),
    "truthfulqa_gen": ("truthfulqa/truthfulqa_gen.yaml", "truthfulqa_gen"),
    "piqa": ("piqa/piqa.yaml", "piqa"),
    "arc_easy": ("arc/arc_easy.yaml", "arc_easy"),
    "arc_challenge": ("arc/arc_challenge.yaml", "arc_challenge"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag"),
    "wikitext": ("wikitext/wikitext.yaml", "wikitext"),
}
"""Where lm-eval keeps each task, and the data set it is about."""
_MMLU_SHOTS = 5


def source_of(name: str) -> Source:
    """The data set `name`: one of `SOURCES`, or `mmlu_SUBJECT`."""
    if not name.startswith("mmlu_"):
        return SOURCES[name]
    subject = name.removeprefix("mmlu_")
    files = {split: (f"{split}/{subject}_{split}.csv", f"{subject}/{split}-*.parquet") for split in ("dev", "test")}
    return Source(("mmlu",), files, ("dev", "test"), _mmlu)


def find_files(source: Source, data_dir: Path) -> dict[str, list[Path]] | None:
    """The files of each split of `source`, in its folder in `data_dir` or in `data_dir`, if that is its folder; None if
    they are not there."""
    own = [data_dir] if data_dir.resolve().name in source.folders else []
    for folder in [*(data_dir / name for name in source.folders), *own]:
        found: dict[str, list[Path]] = {}
        for split, patterns in source.files.items():
            matches = (sorted(folder.glob(pattern)) for pattern in patterns)
            if some := next((paths for paths in matches if paths), None):
                found[split] = some
        if all(split in found for split in source.needs):
            return found
    return None


def local_dataset(demur_source: str, demur_files: Mapping[str, list[str]], **_metadata: Any) -> Any:
    """What lm-eval calls for the data of a task: a `datasets.DatasetDict` of the splits in `demur_files`."""
    from datasets import Dataset, DatasetDict

    read = source_of(demur_source).read
    return DatasetDict(
        {
            split: Dataset.from_list([row for path in paths for row in _read(read, Path(path))])
            for split, paths in demur_files.items()
        }
    )


def _read(read: Callable[[Path], list[Row]], path: Path) -> list[Row]:
    try:
        return read(path)
    except DemurError:
        raise
    except (OSError, UnicodeDecodeError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(
            f"{path} is not as its authors publish it ({type(error).__name__}: {error}); get the file again"
        ) from error


def write_overrides(folder: Path, tasks: Iterable[str], data_dir: Path | None = None) -> list[str]:
    """Write a file into `folder` for each of `tasks` that demur knows, and return those, in their order.

    Raises `NotFoundError` for a `data_dir` that does not exist.
    """
    import lm_eval.tasks

    if data_dir is not None and not data_dir.is_dir():
        raise NotFoundError(f"data folder {data_dir} does not exist; give a folder of data sets")
    shipped = Path(lm_eval.tasks.__file__).parent
    written = []
    for task in tasks:
        where, name = _SHIPPED.get(task, (f"mmlu/default/{task}.yaml", task))
        if not (shipped / where).is_file():
            continue
        settings: dict[str, Any] = {"include": str(shipped / where), "task": task}
        if task.startswith("mmlu_"):
            settings["num_fewshot"] = _MMLU_SHOTS
        lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items()]
        files = find_files(source_of(name), data_dir) if data_dir else None
        if files:
            paths = {split: [str(path.resolve()) for path in some] for split, some in files.items()}
            given = json.dumps({"demur_source": name, "demur_files": paths}, ensure_ascii=False)
            lines += ["custom_dataset: !function demur.eval.tasks.local_dataset\n", f"dataset_kwargs: {given}\n"]
            # lm-eval would look into splits that a task names though nothing is asked from them
            missing = {"training": "train", "validation": "validation"}
            lines += [f"{kind}_split: null\n" for kind, split in missing.items() if split not in files]
        (folder / f"{task}.yaml").write_text("".join(lines), encoding="utf-8")
        written.append(task)
    return written


def load_tasks(names: Iterable[str], data_dir: Path | None = None) -> dict[str, Any]:
    """lm-eval's task objects by name, their data read. `mmlu` is its 57 subjects with five examples each.

    Raises `InputError` for a task that lm-eval does not know, `NotFoundError` for data that is neither in `data_dir`
    nor on the hub.
    """
    from lm_eval.tasks import TaskManager

    tasks = list(dict.fromkeys(task for name in names for task in members(name)))
    with quiet(), tempfile.TemporaryDirectory(prefix="demur-tasks-") as folder:
        others = set(tasks) - set(write_overrides(Path(folder), tasks, data_dir))
        if others:
            progress.say(f"looking for {', '.join(sorted(others))} among all tasks of lm-eval")
        manager = TaskManager(include_path=folder, include_defaults=bool(others))
        found: dict[str, Any] = {}
        for task in tasks:
            found |= _load(manager, task, data_dir)
    seed_shots(found)
    return found


def seed_shots(tasks: Mapping[str, Any]) -> None:
    """Draw few-shot examples from the start again; each run goes on drawing where the one before it stopped."""
    for task in tasks.values():
        task.set_fewshot_seed(_SEED)


def members(name: str) -> list[str]:
    """The tasks that `name` stands for: of `mmlu` its subjects, of `truthfulqa` its three, else the task itself."""
    if name == "truthfulqa":
        return ["truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_gen"]
    if name != "mmlu":
        return [name]
    import lm_eval.tasks

    shipped = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    return sorted(path.stem for path in shipped.glob("mmlu_*.yaml"))


def _load(manager: Any, task: str, data_dir: Path | None) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = manager.load([task])["tasks"]
    except DemurError:
        raise
    except KeyError as error:
        if task in manager.all_tasks:
            raise
        raise InputError(
            f"lm-eval has no task {task!r}; give mmlu, truthfulqa, {', '.join(_SHIPPED)}, or another that "
            "`lm_eval ls tasks` lists"
        ) from error
    except Exception as error:  # the hub out of reach has many classes
        where = f"not in {data_dir}" if data_dir else "not here, as no --data-dir was given"
        first = next(iter(str(error).splitlines()), "")
        raise NotFoundError(
            f"the data of task {task} is {where}, and could not be fetched from the hub "
            f"({type(error).__name__}: {first:.120}); {_how(task)}"
        ) from error
    return loaded


def _how(task: str) -> str:
    """What to do for the data of `task`."""
    if task not in _SHIPPED and not task.startswith("mmlu_"):
        return "run again with a connection to the hub"
    source = source_of(_SHIPPED.get(task, ("", task))[1])
    names = " and ".join(source.files[split][0] for split in source.needs)
    return f"put {names} into {source.folders[0]}/ in a folder and give that as --data-dir"


@contextmanager
def quiet() -> Iterator[None]:
    """No notices and bars of lm-eval and datasets, as progress is shown by ours; and lm-eval compiles each of its
    templates once instead of for every document."""
    import datasets
    import lm_eval.api.task
    import lm_eval.utils

    log = logging.getLogger("lm_eval")
    level, bars = log.level, datasets.are_progress_bars_disabled()
    templates = lm_eval.utils.env
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with (
            _instead(lm_eval.api.task, "tqdm", lambda items, **_: items),  # it has no switch of its own
            _instead(templates, "from_string", lru_cache(templates.from_string)),
        ):
            yield
    finally:
        log.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`value` in place of an attribute, inside the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
