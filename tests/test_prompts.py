"""Our own prompt sets, and what happens to anyone else's file."""

import json
from collections import Counter
from pathlib import Path

import pytest

from demur.data.prompts import OWN, load_prompts, load_questions, prompts_hash, take
from demur.data.suites import load_suite
from demur.errors import InputError, NotFoundError


@pytest.mark.parametrize("name", OWN)
def test_our_sets_are_large_split_and_free_of_repeats(name: str) -> None:
    prompts = load_prompts(name, "harmful" if name == "harmful" else "benign")
    assert len(prompts) >= 120
    assert len({p.category for p in prompts}) >= 10
    assert len({p.text.lower() for p in prompts}) == len(prompts)
    assert min(len(take(prompts, "select")), len(take(prompts, "test"))) >= 30
    assert {p.source for p in prompts} == {f"demur/{name}"}


def test_look_alikes_are_twins_on_the_same_side() -> None:
    harmful = {p.id: p for p in load_prompts("harmful", "harmful")}
    for twin in load_prompts("lookalike", "benign"):
        assert (twin.category, twin.split) == (harmful[twin.twin].category, harmful[twin.twin].split)


def test_our_questions_are_balanced() -> None:
    questions = load_questions()
    assert len(take(questions, "test")) >= 120 or len(questions) >= 120
    assert {len(q.choices) for q in questions} == {4}
    places = Counter(q.answer for q in questions)
    assert max(places.values()) < 0.35 * len(questions)


def test_take_spreads_evenly_and_never_mixes_splits() -> None:
    prompts = load_prompts("plain", "benign")
    few = take(prompts, "test", 12)
    assert len(few) == 12
    assert len({p.category for p in few}) >= 10
    assert not {p.id for p in few} & {p.id for p in take(prompts, "select")}
    assert take(prompts, "test", 10_000) == take(prompts, "test")


def test_the_hash_follows_the_text() -> None:
    prompts = load_prompts("plain", "benign")
    assert prompts_hash(prompts) == prompts_hash(load_prompts("plain", "benign"))
    assert prompts_hash(prompts) != prompts_hash(prompts[1:])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'goal,n\n"Do, this",1\nThat,2\n'),
        ("a.jsonl", '{"goal": "Do, this"}\n\n{"goal": "That"}\n'),
        ("a.json", '[{"goal": "Do, this"}, {"goal": "That"}]'),
        ("a.txt", "Do, this\nThat\n"),
    ],
)
def test_any_file_will_do(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text("\ufeff" + text)
    prompts = load_prompts(str(tmp_path / name), "harmful")
    assert [p.text for p in prompts] == ["Do, this", "That"]
    assert [p.id for p in prompts] == ["a-0001", "a-0002"]
    assert load_prompts(str(tmp_path / name), "harmful") == prompts  # splits come from the text


def test_a_prompt_may_have_several_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"one\ntwo"\n')
    assert load_prompts(str(tmp_path / "a.csv"), "benign")[0].text == "one\ntwo"


def test_a_prompt_may_stand_at_the_end_of_a_talk(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    rows: list[dict[str, object]] = [{"text": "Go on.", "before": [one, "Yes?"]} for one in ("Hello", "Hi")]
    rows.append({"text": "Go on."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for prompts in (load_prompts(str(path), "benign"), load_suite(str(path), otherwise="benign")):
        assert [[(m.role, m.content) for m in p.messages] for p in prompts] == [
            [("user", "Hello"), ("assistant", "Yes?"), ("user", "Go on.")],
            [("user", "Hi"), ("assistant", "Yes?"), ("user", "Go on.")],
            [("user", "Go on.")],
        ]
        assert len({p.id for p in prompts}) == 3
    for before in (["Hello"], "Hello", ["Hello", ""], ["Hello", 1]):
        path.write_text(json.dumps({"text": "Go on.", "before": before}))
        with pytest.raises(InputError, match="an even number of texts"):
            load_prompts(str(path), "benign")


def test_splits_from_text_are_about_thirty_seventy(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"prompt number {i}" for i in range(500)))
    share = len(take(load_prompts(str(path), "benign"), "select")) / 500
    assert 0.22 < share < 0.38


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "{oops", "line 1 is not JSON"),
        ("a.jsonl", '["x"]', "must be a list of objects"),
        ("a.json", '{"x": 1}', "must be a list of objects"),
        ("a.jsonl", '{"text": "hi"}\n{"text": 3}', "row 2: column 'text' is 3, expected text"),
        ("a.csv", "text\nhi\n  \n", "row 2: column 'text'"),
        ("a.csv", "one,two\n1,2\n", "has the columns one, two; say which holds the prompts"),
        ("a.jsonl", '{"text": "hi", "split": "train"}', "split is 'train', expected select or test"),
        ("a.jsonl", '{"text": "hi", "id": "x"}\n{"text": "ho", "id": "x"}', "id 'x' occurs twice"),
        ("a.parquet", "x", "unknown kind"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=sentence):
        load_prompts(str(path), "benign")


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist; give a CSV"):
        load_prompts(str(tmp_path / "none.csv"), "benign")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        load_prompts(str(tmp_path / "b.csv"), "benign")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"question": "q"}, "needs `question`"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer is 2, expected 0 to 1"),
    ],
)
def test_bad_questions(tmp_path: Path, row: dict[str, object], sentence: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=sentence):
        load_questions(str(path))


def test_public_sets_load(shared_data: Path) -> None:
    assert len(load_prompts(str(shared_data / "advbench/advbench.csv"), "harmful")) == 520
    assert len(load_prompts(str(shared_data / "xstest/xstest_prompts.csv"), "benign")) == 450
    behaviours = shared_data / "harmbench/harmbench_behaviors_text_all.csv"
    assert len(load_prompts(str(behaviours), "harmful", "Behavior")) == 400
