"""A folder of small made-up data sets in the shapes in which the real ones are published, for tests."""

import csv
import json
from pathlib import Path
from typing import Any

COLOURS = ("red", "blue", "green", "yellow")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_benchmarks(folder: Path) -> None:
    """MMLU (two subjects), TruthfulQA, GSM8K, PIQA, ARC-Easy, HellaSwag and WikiText."""
    for subject in ("anatomy", "virology"):
        for split, n in (("dev", 5), ("test", 4)):
            path = folder / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                rows = [[f'What is {split} {i} of "{subject}", please?', *COLOURS, i % 4] for i in range(n)]
                csv.writer(file).writerows([["question", *(f"choice{i}" for i in range(4)), "answer"], *rows])
    answers = {f"It is {colour}.": int(i == 0) for i, colour in enumerate(COLOURS)}
    questions = [f"What colour is cake {i}?" for i in range(3)]
    folder.joinpath("truthfulqa").mkdir()
    (folder / "truthfulqa" / "mc_task.json").write_text(
        json.dumps([{"question": q, "mc1_targets": answers, "mc2_targets": answers | {"Blue": 1}} for q in questions])
    )
    with (folder / "truthfulqa" / "TruthfulQA.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
        )
        table.writerows(
            ["Adversarial", "Food", q, "It is red", "It is red; Red", "Blue; It is blue;", ""] for q in questions
        )
    sums = [
        {"question": f"What is {i} and {i}?", "answer": f"It is {i}+{i}=<<{i}+{i}={2 * i}>>.\n#### {2 * i}"}
        for i in range(9)
    ]
    jsonl(folder / "gsm8k" / "train.jsonl", sums)
    jsonl(folder / "gsm8k" / "test.jsonl", sums[:3])
    goals = [{"goal": f"make cake {i}", "sol1": "mix it " * (i + 1), "sol2": "ask for a blue one"} for i in range(4)]
    jsonl(folder / "piqa" / "valid.jsonl", goals)
    (folder / "piqa" / "valid-labels.lst").write_text("0\n1\n1\n0\n")
    choices = [{"text": colour, "label": label} for colour, label in zip(COLOURS, "ABCD", strict=True)]
    arc = [
        {"id": f"a{i}", "question": {"stem": f"Colour {i}?", "choices": choices}, "answerKey": "B"} for i in range(2)
    ]
    jsonl(folder / "ARC-Easy" / "ARC-Easy-Test.jsonl", arc)
    jsonl(
        folder / "hellaswag" / "hellaswag_val.jsonl",
        [
            {
                "activity_label": "Baking",
                "ctx_a": "A man has a cake.",
                "ctx_b": "he",
                "endings": [f"eats {colour}" for colour in COLOURS],
                "label": 2,
            }
        ],
    )
    folder.joinpath("wikitext").mkdir()
    (folder / "wikitext" / "wiki.test.raw").write_text(
        " \n = Cake = \n \n A cake is @-@ here . \n = = Colour = = \n It is blue . \n = Blue = \n \n Blue is blue . \n"
    )
