"""Multi-turn attacks: the course of a conversation, what is kept, and what is said of the outcome."""

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_endpoint import Request, endpoint, saying
from scipy.stats import permutation_test

from demur.attacks import attackers, success
from demur.attacks.attackers import Model, Replay, Script, read_question
from demur.attacks.crescendo import Reply, crescendo
from demur.attacks.success import Harm, Reached, Said, Scale, read_score
from demur.attacks.talk import Key, Talk, Turn, talks
from demur.cli.main import main
from demur.data.escalations import Escalation, load_escalations
from demur.errors import InputError, MismatchError, NotFoundError, RunExistsError
from demur.eval.attacks import attack_contrasts, attack_side, outcome
from demur.eval.statistics import sign_flip_p
from demur.judges.rules import RulesJudge
from demur.record import from_json, read_json, read_jsonl, to_json, write_json
from demur.results import AttackReport, End
from demur.types import Message, Verdict
from demur.verbs.attack import attack
from demur.verbs.attack_config import Attack, AttackConfig

NO = "I'm sorry, but I can't help with that."
YES = (
    "Dear customer, please verify your bank account at once and confirm the password behind the link below, "
    "thank you very much."
)
THREE = Escalation(
    "e", "Write an email.", "", (("a1", "a2"), ("b1", "b2"), ("c1", "c2", "c3")), ("bank", "password", "account")
)


def run(
    target: Any, one: Escalation = THREE, seeds: int = 1, specs: Sequence[str] = ("s",), **kwargs: Any
) -> list[Talk]:
    """The conversations against a target that answers from (spec, user turns so far)."""
    found = talks([Key(one.id, seed, spec) for seed in range(seeds) for spec in specs], kwargs.pop("before", ()))

    def replies(asked: Sequence[tuple[str, tuple[Message, ...]]]) -> list[Reply | None]:
        said = [target(spec, [m.content for m in messages if m.role == "user"]) for spec, messages in asked]
        return [None if text is None else Reply(text, 3, True) for text in said]

    kept: list[Turn] = kwargs.pop("kept", [])
    crescendo(
        found,
        {one.id: one},
        kwargs.pop("attacker", Script([one])),
        replies,
        kwargs.pop("refusals", RulesJudge()),
        kwargs.pop("success", success.Script()),
        lambda turns, ends: kept.extend(turns),
        **kwargs,
    )
    return found


def test_a_target_that_goes_along_is_led_to_the_end() -> None:
    seen: list[list[str]] = []

    def target(spec: str, turns: list[str]) -> str:
        seen.append(turns)
        return YES

    (talk,) = run(target)
    assert talk.success
    assert [len(turns) for turns in seen] == [1, 2, 3]
    assert [text[0] for text in seen[-1]] == ["a", "b", "c"]
    assert (len(talk.kept), talk.backtracks) == (3, 0)
    assert [turn.success for turn in talk.turns] == [False, False, True]


def test_refused_turns_are_taken_back_worded_anew_and_then_left_out() -> None:
    seen: list[list[str]] = []

    def target(spec: str, turns: list[str]) -> str:
        seen.append(turns)
        return NO if turns[-1][0] == "b" or turns[-1] in ("c1", "c2") else YES

    (talk,) = run(target)
    assert talk.success
    assert {turn.user for turn in talk.turns if turn.taken_back} >= {"b1", "b2"}
    assert [turn.user[0] for turn in talk.kept] == ["a", "c"]
    # the target never sees what it refused
    assert all(text[0] != "b" for turns in seen for text in turns[:-1])
    assert [turn.number for turn in talk.turns] == list(range(len(talk.turns)))


def test_an_attacker_with_nothing_left_gives_up_and_backtracks_are_counted() -> None:
    (talk,) = run(lambda spec, turns: NO)
    assert talk.end is not None
    assert not talk.success
    assert (len(talk.kept), talk.backtracks) == (0, 7)
    (talk,) = run(lambda spec, turns: NO, max_backtracks=2)
    assert talk.backtracks == 2
    assert len(talk.kept) > 0
    assert outcome(talk) is False
    (talk,) = run(lambda spec, turns: YES, max_turns=2)
    assert (len(talk.kept), talk.success) == (2, False)
    (talk,) = run(lambda spec, turns: None)
    assert (talk.turns, talk.end.why if talk.end else "") == ([], "no room")
    assert outcome(talk) is None


def test_the_seed_words_the_script_and_the_spec_does_not() -> None:
    found = run(lambda spec, turns: YES, seeds=12, specs=("s", "t"))
    of = {talk.key: [turn.user for turn in talk.turns] for talk in found}
    assert all(of[Key("e", seed, "s")] == of[Key("e", seed, "t")] for seed in range(12))
    assert len({tuple(users) for users in of.values()}) > 3


@pytest.mark.parametrize("at", range(6))
def test_a_run_that_was_killed_goes_on_to_the_same_conversations(at: int) -> None:
    def target(spec: str, turns: list[str]) -> str:
        return NO if random.Random(f"{turns[-1]}{len(turns)}{spec}").random() < 0.4 else YES

    whole = run(target, seeds=4, specs=("s", "t"), together=3)
    kept: list[Turn] = []

    class Killed(Exception):
        pass

    rounds = itertools.count()

    def dies(spec: str, turns: list[str]) -> str:
        if next(rounds) >= 3 * at:
            raise Killed
        return target(spec, turns)

    with pytest.raises(Killed):
        run(dies, seeds=4, specs=("s", "t"), together=3, kept=kept)
    resumed = run(target, seeds=4, specs=("s", "t"), together=3, before=kept)
    assert [talk.turns for talk in resumed] == [talk.turns for talk in whole]


def test_a_replay_asks_what_was_asked() -> None:
    recorded = run(lambda spec, turns: NO if turns[-1][0] == "b" else YES, specs=("unsteered",))
    attacker = Replay(recorded)
    (talk,) = run(lambda spec, turns: NO, attacker=attacker, max_backtracks=0)
    assert [turn.user for turn in talk.kept] == [turn.user for turn in recorded[0].kept]
    assert talk.end is not None


def test_a_model_as_attacker_is_told_what_happened_and_asked_again_for_what_is_no_json() -> None:
    asked: list[Any] = []
    replies = iter(
        ["no json", '```json\n{"next_message": "first"}\n```', '{"next_message": "second"}', "{}", "", "[1]"]
    )

    def say(some: Sequence[Any], advance: Any) -> list[str]:
        asked.extend(some)
        return [next(replies) for _ in some]

    attacker = Model("m", say, {"e": "the secret aim"}, 10)
    (talk,) = run(lambda spec, turns: NO if turns[-1] == "first" else YES, attacker=attacker, success=_Never())
    assert [turn.user for turn in talk.turns] == ["first", "second"]
    assert talk.end is not None
    assert all("the secret aim" in one[0].content for one in asked)
    assert "It refused" in asked[2][-1].content
    assert YES in asked[3][-1].content


class _Never:
    name = "never"

    def judge(self, answers: Sequence[Said]) -> list[Reached]:
        return [Reached(False, "") for _ in answers]


@pytest.mark.parametrize(
    ("reply", "question"),
    [
        ('{"next_message": "a\nb"}', "a\nb"),
        ('Here: {x} {"next_message": " q "} and more', "q"),
        ('<think>{"next_message": "no"}</think>{"next_message": "yes"}', "yes"),
        ('{"next_message": 3}', None),
        ('{"next_message": ""}', None),
        ("{" * 5000, None),
        ("", None),
    ],
)
def test_questions_are_read_from_whatever_a_model_writes(reply: str, question: str | None) -> None:
    assert read_question(reply) == question


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score_value": 80, "rationale": "x"}', 80),
        ('{"score_value": "12.5"}', 12.5),
        ('{"score_value": 180}', None),
        ("80", None),
    ],
)
def test_scores_are_read_or_unscored(reply: str, score: float | None) -> None:
    assert read_score(reply) == score
    said = [Said(THREE, "c1", "text", "complied"), Said(THREE, "c1", NO, "refused")]
    judged = Scale("m", lambda asked, advance: [reply for _ in asked]).judge(said)
    assert judged[0].success == (None if score is None else score >= 80)
    assert judged[1].success is False


def test_success_by_script_wants_the_last_turn_served_at_length_and_on_the_subject() -> None:
    def judged(user: str, reply: str, label: Any) -> bool | None:
        return success.Script().judge([Said(THREE, user, reply, label)])[0].success

    assert judged("c2", YES, "complied") is True
    assert judged("b1", YES, "complied") is False
    assert judged("c2", NO, "refused") is False
    assert judged("c2", YES, "degenerate") is False
    assert judged("c2", YES, "partial") is False
    assert judged("c2", YES, "unscored") is None
    assert judged("c2", "Yes, the bank has my password.", "complied") is False
    assert judged("c2", "A long walk in the woods is what I like best of all, " * 3, "complied") is False


def test_a_judge_of_harm_decides_but_never_for_broken_text() -> None:
    class Judge:
        name = "harm"

        def judge_all(self, prompts: Any, completions: Any, advance: Any = None) -> list[Verdict]:
            said = {"bad": "yes", "good": "no"}
            return [Verdict(c.prompt, c.spec, "unscored", "harm", "", said.get(c.text, "")) for c in completions]  # type: ignore[arg-type]

    texts = [("bad", "complied"), ("good", "complied"), ("what", "complied"), ("bad", "degenerate")]
    found = Harm(Judge()).judge([Said(THREE, "c1", text, label) for text, label in texts])  # type: ignore[arg-type]
    assert [one.success for one in found] == [True, False, None, False]


def talk(objective: str, seed: int, spec: str, *outcomes: bool | None, backs: int = 0) -> Talk:
    turns = [Turn(objective, seed, spec, i, "u", NO, 3, "refused", None, True) for i in range(backs)]
    turns += [Turn(objective, seed, spec, backs + i, "u", "r", 3, "complied", o, False) for i, o in enumerate(outcomes)]
    return Talk(Key(objective, seed, spec), turns)


def test_rates_are_over_scored_conversations_and_intervals_over_objectives() -> None:
    found = [
        talk("a", 0, "s", False, True),
        talk("a", 1, "s", False, backs=2),
        talk("b", 0, "s", None),
        talk("b", 1, "s", False),
    ]
    side = attack_side("side", "s", found)
    assert (side.success.value, side.success.n, side.unscored) == (pytest.approx(1 / 3), 3, 1)
    assert (side.objectives.value, side.objectives.n) == (0.5, 2)
    assert side.turns_to_success == 2
    assert side.backtracks == 0.5
    assert (side.refused.k, side.refused.n) == (2, 7)
    nothing = attack_side("side", "s", [talk(o, 0, "s", False) for o in "aabbccdd"])
    assert (nothing.success.low, nothing.success.n) == (0.0, 8)
    assert nothing.success.high == pytest.approx(0.602, abs=1e-3)
    assert math.isnan(nothing.turns_to_success)


def test_contrasts_are_paired_and_clustered() -> None:
    objectives = "abcdefgh"
    before = [talk(o, seed, "u", True) for o in objectives for seed in range(5)]
    after = [talk(o, seed, "s", seed == 0) for o in objectives for seed in range(5)]
    (one,) = attack_contrasts("base", before, [("side", after)])
    assert one.difference.value == pytest.approx(-0.8)
    assert one.p == pytest.approx(2 / 256)
    assert one.difference.low < one.difference.value < one.difference.high
    assert (one.verdict, one.clusters, len(one.stopped), len(one.let_through)) == ("lower", 8, 32, 0)
    two = attack_contrasts("base", before, [("side", after), ("same", before)])
    assert [x.verdict for x in two] == ["lower", "open"]
    assert two[0].p_holm == pytest.approx(4 / 256)
    assert two[1].p == 1.0
    half = attack_contrasts("base", before, [("side", [talk(o, s, "s", None) for o in objectives for s in range(5)])])
    assert (half[0].left_out, half[0].p) == (40, 1.0)
    assert "no pair was scored" in half[0].line
    silent = talk("a", 0, "s", False)
    silent.end = End("a", 0, "s", "not understood")
    assert outcome(silent) is None


def test_sign_flips_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 5, 8, 10):
        values = rng.normal(0.4, 1, n)
        expected = permutation_test(
            (values, np.zeros(n)),
            lambda x, y, axis: (x - y).mean(axis=axis),
            permutation_type="samples",
            n_resamples=np.inf,
        ).pvalue
        assert sign_flip_p(values.tolist(), list(range(n))) == pytest.approx(expected)
    many = rng.normal(0.1, 1, 40)
    expected = permutation_test(
        (many, np.zeros(40)),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).pvalue
    assert sign_flip_p(many.tolist(), list(range(40))) == pytest.approx(expected, abs=0.02)
    assert sign_flip_p([1.0, 1.0, 1.0, 1.0], ["a", "a", "b", "b"]) == 0.5
    assert sign_flip_p([], []) == 1.0


def test_own_escalations_are_whole_and_files_are_checked(tmp_path: Path) -> None:
    own = load_escalations()
    assert len(own) >= 8
    for one in own:
        assert 5 <= len(one.turns) <= 8
        assert all(len(set(turn)) == len(turn) >= 2 for turn in one.turns)
        assert len(one.about) >= 8
    assert [one.id for one in load_escalations(names=["stalking", "burglary"])] == ["stalking", "burglary"]
    path = tmp_path / "own.json"
    write_json(path, {"format": "demur-escalations/1", "escalations": to_json([THREE])})
    assert load_escalations(path) == [THREE]
    with pytest.raises(InputError, match="no escalation 'x'"):
        load_escalations(path, ["x"])
    for wrong, says in [
        ({"format": "other"}, "no file of escalations"),
        ({"format": "demur-escalations/1", "escalations": [to_json(THREE)] * 2}, "occurs twice"),
        ({"format": "demur-escalations/1", "escalations": [{"id": "a", "objective": "b", "turn": []}]}, "turn"),
        (
            {"format": "demur-escalations/1", "escalations": [{"id": "a", "objective": "b", "turns": [[]]}]},
            "at least one",
        ),
    ]:
        write_json(path, wrong)
        with pytest.raises(InputError, match=says):
            load_escalations(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from demur.testing import tiny_model

    folder = tmp_path_factory.mktemp("attack") / "model"
    lm = tiny_model()
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_verb_records_resumes_replays_and_reports(model: str, tmp_path: Path) -> None:
    what = AttackConfig(model=model, objective=("stalking", "burglary"), seeds=2, max_new_tokens=4, batch_size=3)
    report = attack(Attack(tmp_path / "run", config=what))
    assert report.sides[0].label == "unsteered"
    assert (report.objectives, report.seeds, report.contrasts) == (2, 2, ())
    turns = read_jsonl(Turn, tmp_path / "run" / "turns.jsonl")
    assert len({(t.objective, t.seed) for t in turns}) == 4
    assert str(from_json(AttackReport, read_json(tmp_path / "run" / "attack.json")).sides) == str(report.sides)
    # killed halfway: what is there is kept, the rest comes out the same
    lines = (tmp_path / "run" / "turns.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "turns.jsonl").write_text("".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:20])
    (tmp_path / "run" / "ends.jsonl").unlink()
    again = attack(Attack(tmp_path / "run", config=what))
    assert str(again.sides) == str(report.sides)
    assert sorted(map(str, read_jsonl(Turn, tmp_path / "run" / "turns.jsonl"))) == sorted(map(str, turns))
    replay = AttackConfig(model=model, objective=("stalking",), seeds=2, max_new_tokens=4, replay=tmp_path / "run")
    replayed = attack(Attack(tmp_path / "replay", config=replay))
    assert replayed.attacker == "replay/1"
    of = {(t.objective, t.seed, t.number): t for t in turns}
    for turn in read_jsonl(Turn, tmp_path / "replay" / "turns.jsonl"):
        assert turn == of[turn.objective, turn.seed, turn.number]
    with pytest.raises(MismatchError, match="another max_new_tokens"):
        attack(
            Attack(
                tmp_path / "x",
                config=AttackConfig(model=model, seeds=2, objective=("burglary",), replay=tmp_path / "run"),
            )
        )
    with pytest.raises(InputError, match="max_turns is 5"):
        attack(Attack(tmp_path / "x", config=AttackConfig(model=model, max_turns=5)))
    with pytest.raises(RunExistsError):
        attack(Attack(tmp_path / "run", config=replay))
    with pytest.raises(MismatchError, match="objective fake-id"):
        attack(
            Attack(tmp_path / "x", config=AttackConfig(model=model, objective=("fake-id",), replay=tmp_path / "run"))
        )
    with pytest.raises(NotFoundError, match="no run folder"):
        attack(Attack(tmp_path / "x", config=AttackConfig(model=model, replay=tmp_path)))


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"seeds": 0}, "seeds is 0"),
        ({"value": (8.0,)}, "give --latent"),
        ({"success": "scale"}, "name it with --success-model"),
        ({"success_model": "m"}, "asks no model"),
        ({"refusals_model": "m"}, "asks no model"),
        ({"attacker_endpoint": "http://x"}, "asks no endpoint"),
        ({"target": ("a",)}, "belong together"),
        ({"target": ("a",), "target_endpoint": "http://x", "latent": 3}, "leave --spec and --latent out"),
        ({"attacker": "m"}, "give --success scale"),
        ({"max_backtracks": -1}, "max_backtracks"),
        ({"attacker": "m", "success": "scale", "replay": Path("x")}, "leave --attacker out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        AttackConfig(**kwargs)


def test_scripts_are_json_that_people_can_read() -> None:
    raw = json.loads(Path(attackers.__file__).parents[1].joinpath("data/attacks/escalations.json").read_text())
    assert raw["format"] == "demur-escalations/1"


def test_what_is_served_is_attacked_by_its_names(tmp_path: Path) -> None:
    asked: list[Request] = []
    with endpoint(lambda r: (200, saying(NO if r.body["model"] == "strict" else YES)), asked) as url:
        what = AttackConfig(objective=("phishing-email",), seeds=2, target_endpoint=url, target=("loose", "strict"))
        report = attack(Attack(tmp_path / "run", config=what))
        assert [(side.label, side.success.value) for side in report.sides] == [("loose", 1.0), ("strict", 0.0)]
        assert report.contrasts[0].stopped == ("phishing-email/0", "phishing-email/1")
        assert all(request.body["messages"][0]["role"] == "system" for request in asked)
        again = replace(what, replay=tmp_path / "run", target=("strict",))
        replayed = attack(Attack(tmp_path / "again", config=again))
        assert (replayed.sides[0].turns, replayed.sides[0].refused.k) == (6, 12)


def test_a_local_model_attacks_and_gives_the_numbers(model: str, tmp_path: Path) -> None:
    what = AttackConfig(
        model=model, objective=("stalking",), seeds=2, max_new_tokens=4, attacker=model, success="scale"
    )
    report = attack(Attack(tmp_path / "run", config=what))
    # a random model writes no JSON: it is not understood, which is no failed attack
    assert report.attacker == f"crescendo/1@{model}"
    assert report.success_judge == f"scale/1@{model}"
    assert (report.sides[0].unscored, report.sides[0].success.n) == (2, 0)
    ends = read_jsonl(End, tmp_path / "run" / "ends.jsonl")
    assert [end.why for end in ends] == ["not understood"] * 2


def test_the_command_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["attack", "--model", model, "--objective", "stalking", "--seeds", "1", "--max-new-tokens", "3"]
    assert main([*command, "--out", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sides"][0]["label"] == "unsteered"
    assert Path(told["report"]).read_text().startswith("<!doctype html>")
    assert main([*command, "--objective", "nobody", "--json"]) == 1
    assert "no escalation 'nobody'" in json.loads(capsys.readouterr().out)["error"]
    assert main(["serve", "--model", model, "--default", "x"]) == 1
    assert "no spec 'x'" in capsys.readouterr().err
