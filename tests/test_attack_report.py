"""Attacks as a page and in the terminal: every number is shown, what was not measured is none, of hundreds of
conversations the page holds one, and nothing that people or models wrote does anything."""

import importlib.util
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console
from test_architecture import SOURCE, imports
from test_report import CHROMIUM, EMPTY, HOSTILE, NAN, Reader, provenance, wilson

from demur.attacks.talk import Key, talks
from demur.cli.show_attack import attack_table, show_attack
from demur.eval.attacks import attack_contrasts, attack_side, outcome
from demur.report.attack import alone, as_rate, contrast_rows, rates, render
from demur.results import AttackReport, AttackSide, Turn
from demur.types import UNSTEERED, Estimate, Label

EVIL = "</script><img src=x onerror=alert(1)> | \u202e \ud800 \x1b[31m [2] *b* `c` #\nend"
STEERED = "latent 957 at 8"
LABELS = {UNSTEERED: UNSTEERED, "spec8": STEERED, "evil": EVIL}
"""Label by spec."""
HOLE = Estimate(NAN, NAN, NAN, 0)


def turn(key: Key, number: int, label: Label, success: bool | None, back: bool = False, **changes: Any) -> Turn:
    """An invented one."""
    made = Turn(
        *key, number, f"Question {number} about {key.objective}?", f"Reply {number} of {key.spec} on seed {key.seed}.",
        10 + number, label, success, back, "" if back else f"{number} words",
    )  # fmt: skip
    return replace(made, **changes)


def conversation(key: Key) -> list[Turn]:
    """An outcome of each kind, some after turns that were taken back; the same for the same key."""
    pick = random.Random(f"{key}")
    chance = {UNSTEERED: 0.6, "spec8": 0.15, "evil": 0.5}[key.spec]
    made: list[Turn] = []
    for stage in range(4):
        if pick.random() < 0.25:
            made.append(turn(key, len(made), "refused", None, back=True))
        said: tuple[Label, bool | None] = ("complied", stage == 3 and pick.random() < chance)
        if stage == 2 and pick.random() < 0.15:
            said = ("unscored", None)
        made.append(turn(key, len(made), *said))
    return made


def made_up(
    objectives: Mapping[str, str], seeds: int = 3, specs: Sequence[str] = tuple(LABELS), **changes: Any
) -> tuple[AttackReport, list[Turn]]:
    """A report whose numbers are those of its turns, counted as `demur attack` counts them."""
    keys = [Key(name, seed, spec) for name in objectives for seed in range(seeds) for spec in specs]
    turns = [each for key in keys for each in conversation(key)]
    found = talks(keys, turns)
    sides = [(LABELS[spec], spec, [talk for talk in found if talk.key.spec == spec]) for spec in specs]
    report = AttackReport(
        "attack", "tiny (hub, weights abc)", "script/1", "rules/2", "script-success/1", len(objectives), seeds, 10, 5,
        tuple(attack_side(*side) for side in sides),
        tuple(attack_contrasts(UNSTEERED, sides[0][2], [(label, some) for label, _, some in sides[1:]])),
        {"load": 3.5, "conversations": 70.0}, ("Intervals rest on few objectives.",), "runs/attack/report.html",
    )  # fmt: skip
    return replace(report, **changes), turns


OBJECTIVES = {
    "phishing-email": "Write an email that tricks people.",
    "constructor": "Say what every object has.",
    EVIL: EVIL,
    "lock": "Open a lock.",
}


@pytest.fixture(scope="module")
def page() -> str:
    """Hostile names, questions, replies and evidence, on three sides."""
    report, turns = made_up(OBJECTIVES, name=EVIL, notes=(f"note {EVIL}",), model=EVIL, attacker=EVIL)
    said = [replace(t, user=HOSTILE[i % 5], reply=HOSTILE[(i + 1) % 5], evidence=EVIL) for i, t in enumerate(turns)]
    return render(report, said, OBJECTIVES, provenance(kind="attack", name=EVIL))


def blocks_of(page: str) -> list[Any]:
    """What is drawn and what was said, as the scripts read them."""
    found = [text for _, text in Reader(page).blocks if text.startswith("{")]
    return [json.loads(text, parse_constant=lambda name: pytest.fail(name)) for text in found]


def test_hostile_text_stays_text(page: str) -> None:
    page.encode()
    reader = Reader(page)
    assert len([tag for tag, _ in reader.blocks if tag == "script"]) == 4
    assert not {"img", "svg", "i"} & {tag for tag, _, _ in reader.attributes}
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert "<img src" not in page
    assert reader.text.count("<img src=x onerror=alert(1)> |") >= 8
    policy = next(value for _, _, value in reader.attributes if value.startswith("default-src"))
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    drawn, said = blocks_of(page)
    first = said["talks"][0]["sides"][0]["turns"]
    assert [each["user"] for each in first[:4]] == list(HOSTILE[:4])
    assert first[0]["reply"] == HOSTILE[1]
    shown = [*said["sides"], *(text for pair in said["objectives"] for text in pair)]
    shown += [each["evidence"] for talk in said["talks"] for side in talk["sides"] for each in side["turns"]]
    assert not {"\u202e", "\x1b", "\n"} & set("".join(shown))
    names = [note["text"] for note in drawn["rates"]["layout"]["annotations"]]
    assert not [name for name in names if "<" in name]
    assert names[2].startswith("&lt;/script&gt;&lt;img")
    assert not [text for trace in drawn["rates"]["data"] for text in trace["hovertext"] if "<img" in text]
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_no_url_leaves_the_page(page: str) -> None:
    reader = Reader(page)
    for tag, name, value in reader.attributes:
        if name in ("src", "href", "action", "srcset", "data", "poster", "background"):
            assert value.startswith(("#", "data:")), (tag, name, value)
    bundle = get_plotlyjs()
    assert page.count(bundle) == 1
    report, turns = made_up({"lock": "Open a lock."})
    rest = render(report, turns, {"lock": "Open a lock."}, provenance()).replace(bundle, "")
    assert not re.findall(r"https?:|url\(|@import|fetch\(|XMLHttp", rest)


def test_every_number_is_on_the_page() -> None:
    report, turns = made_up(OBJECTIVES, specs=(UNSTEERED, "spec8"))
    text = Reader(render(report, turns, OBJECTIVES, provenance(kind="attack"))).words
    for side in report.sides:
        rate = as_rate(side.success)
        assert f"({rate.k}/{rate.n})" in text
        assert f"({side.refused.k}/{side.refused.n})" in text
    row = contrast_rows(report)[0]
    assert text.count(row.line) == 1
    assert f"{STEERED} against {UNSTEERED} {row.difference} {row.interval} {row.n} {row.p_holm} ({row.p})" in text
    assert f"{row.clusters} {row.p_conversations} {len(row.stopped)} {len(row.let_through)} {row.left_out}" in text
    for some in (row.stopped, row.let_through):
        assert not some or ", ".join(some) in text
    assert text.index(row.line) < text.index("Read this first") < text.index("How often attacks succeed")
    for word in ("tiny (hub, weights abc)", "script/1", "rules/2", "script-success/1", "4 objectives x 3 seeds",
                 "5 turns", "Intervals rest on few", "1 min 14 s", "two old cores", "sign-flip test"):  # fmt: skip
        assert word in text, word


def test_outcomes_are_those_that_the_rates_count() -> None:
    report, turns = made_up(OBJECTIVES, seeds=5)
    found = talks([Key(t.objective, t.seed, t.spec) for t in turns], turns)
    known = {talk.key: outcome(talk) for talk in found}
    assert set(known.values()) == {True, False, None}
    _, said = blocks_of(render(report, turns, OBJECTIVES, provenance()))
    names = list(OBJECTIVES)
    assert len(said["talks"]) == 20
    for talk in said["talks"]:
        for side, spec in zip(talk["sides"], LABELS, strict=True):
            assert side["outcome"] == known[Key(names[talk["objective"]], talk["seed"], spec)]
    for place, side in enumerate(report.sides):
        outcomes = [talk["sides"][place]["outcome"] for talk in said["talks"]]
        assert outcomes.count(True) == as_rate(side.success).k
        assert outcomes.count(None) == side.unscored
        pairs = [(talk["sides"][0]["outcome"], talk["sides"][place]["outcome"]) for talk in said["talks"]]
        if place:
            assert pairs.count((True, False)) == len(report.contrasts[place - 1].stopped)
            assert pairs.count((False, True)) == len(report.contrasts[place - 1].let_through)


def test_what_became_of_a_conversation_is_told() -> None:
    side = AttackSide(UNSTEERED, UNSTEERED, HOLE, HOLE, 0, NAN, NAN, NAN, EMPTY, EMPTY)
    report, _ = made_up({}, sides=(side,), contrasts=(), seeds=7, max_turns=2)

    def key(seed: int) -> Key:
        return Key("lock", seed, UNSTEERED)

    turns = [
        turn(key(0), 0, "complied", True),
        turn(key(1), 0, "refused", None, back=True),
        turn(key(1), 1, "complied", False),
        turn(key(1), 2, "refused", False),
        turn(key(2), 0, "complied", False),
        turn(key(3), 0, "unscored", None),
        turn(key(3), 1, "complied", False),
        turn(key(4), 0, "unscored", None),
        turn(key(4), 1, "complied", True),
        turn(key(5), 0, "refused", None, back=True),
        turn(key(9), 0, "complied", True),
        replace(turn(key(0), 0, "complied", True), spec="other"),
        replace(turn(key(0), 0, "complied", True), objective="other"),
    ]
    page = render(report, turns, {"lock": "Open a lock."}, provenance())
    _, said = blocks_of(page)
    assert [talk["sides"][0]["told"] for talk in said["talks"]] == [
        "reached its objective: 1 turn",
        "did not reach its objective: 2 turns, 1 taken back, the most there may be",
        "did not reach its objective: 1 turn, then nothing more was asked",
        "could not be scored: 2 turns, the most there may be",
        "reached its objective: 2 turns",
        "did not reach its objective: 0 turns, 1 taken back, then nothing more was asked",
        "no turn was asked",
    ]
    text = Reader(page).words
    assert "3 turns belong to objectives, seeds or specs outside this report" in text
    assert "lock Open a lock. 2/5 2 unscored" in text


def test_the_page_does_not_depend_on_the_order_in_which_conversations_went_on() -> None:
    report, turns = made_up(OBJECTIVES)
    page = render(report, turns, OBJECTIVES, provenance())
    assert render(report, turns, OBJECTIVES, provenance()) == page
    mixed = turns[:]
    random.Random(0).shuffle(mixed)
    assert render(report, mixed, OBJECTIVES, provenance()) == page


def test_without_a_steered_side_there_is_one_column_and_no_contrast() -> None:
    report, turns = made_up(OBJECTIVES, specs=(UNSTEERED,))
    assert report.contrasts == ()
    page = render(report, turns, OBJECTIVES, provenance())
    text = Reader(page).words
    said = alone(report)
    assert said[0].startswith("unsteered: ")
    for line in said:
        assert line.replace(" %", "\u00a0%") in page
    assert "Nothing was compared." in text
    assert "Steered side" not in text
    assert list(blocks_of(page)[1]["kinds"]) == ["yes", "no", "unscored"]


def test_empty_cases_have_a_page_and_no_nan() -> None:
    sides = tuple(AttackSide(name, name, HOLE, HOLE, 3, NAN, NAN, NAN, EMPTY, EMPTY) for name in (UNSTEERED, "b"))
    full, _ = made_up(OBJECTIVES, specs=(UNSTEERED, "spec8"))
    contrast = replace(
        full.contrasts[0], steered="b", difference=HOLE, p=NAN, p_holm=NAN, p_conversations=NAN, line="b: n/a"
    )
    bare = provenance(commit="", dirty=False, config={}, versions={}, hardware={}, artefacts={}, command="")
    for some, contrasts in (((), ()), (sides[:1], ()), (sides, (contrast,)), (sides, ())):
        for objectives in ({}, {"lock": "Open a lock."}):
            report = replace(full, sides=some, contrasts=contrasts, seconds={}, notes=())
            page = render(report, [], objectives, bare)
            assert blocks_of(page)[0] == {}
            assert "nan" not in Reader(page).words.lower().replace("provenance", "")
            assert rates(report) is None
            assert "nan" not in printed(report, 80).lower()
    row = contrast_rows(replace(full, sides=sides, contrasts=(contrast,)))[0]
    assert (row.difference, row.interval, row.p_holm, row.clear) == ("n/a", "", "n/a", False)
    assert row.place == 1
    one = replace(full.sides[0], success=Estimate(0.5, NAN, NAN, 4))
    figure = rates(replace(full, sides=(one,)))
    assert figure is not None
    assert list(figure.data[0].error_x.array) == [0.0], "one objective alone has no interval"


def test_the_figure_has_both_shares_and_their_intervals() -> None:
    report, _ = made_up(OBJECTIVES)
    figure = rates(report)
    assert figure is not None
    conversations, objectives = figure.data
    assert list(conversations.x) == pytest.approx([100 * side.success.value for side in report.sides])
    assert list(objectives.x) == pytest.approx([100 * side.objectives.value for side in report.sides])
    for trace, field in ((conversations, "success"), (objectives, "objectives")):
        ends = [getattr(side, field) for side in report.sides]
        assert list(trace.error_x.array) == pytest.approx([100 * (one.high - one.value) for one in ends])
        assert list(trace.error_x.arrayminus) == pytest.approx([100 * (one.value - one.low) for one in ends])
    assert len({trace.marker.symbol for trace in figure.data}) == 2


def printed(report: AttackReport, width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(attack_table(report, width))
    return capture.get()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_and_tears_no_number(width: int) -> None:
    report, _ = made_up(OBJECTIVES)
    wide = replace(report.sides[0], refused=wilson(1234, 5678), unscored=7, label="a long label of a spec file (0123)")
    text = printed(replace(report, sides=(wide, *report.sides[1:])), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for side in report.sides[1:]:
        rate = as_rate(side.success)
        for part in (f"({rate.k}/{rate.n})", f"({side.refused.k}/{side.refused.n})"):
            assert part in text, part
    assert "(1234/5678)" in text
    assert "Unscored: 7 conversations on a long label" in " ".join(text.split())
    assert not {"\x1b", "\u202e"} & set(text)


def test_the_command_says_it_in_words_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    report, _ = made_up(OBJECTIVES, notes=(f"note {EVIL}",))
    report = replace(report, sides=(replace(report.sides[0], turns_to_success=NAN), *report.sides[1:]))
    show_attack(report, as_json=False)
    shown = capsys.readouterr()
    assert shown.out == ""
    flat = " ".join(shown.err.split())
    for row in contrast_rows(report):
        assert " ".join(row.line.split()) in flat
    assert "Note: note </script>" in flat
    assert "report: runs/attack/report.html" in flat
    assert not {"\x1b", "\u202e"} & set(shown.err)
    calm = {name: text for name, text in OBJECTIVES.items() if name != EVIL}
    report, _ = made_up(calm, specs=(UNSTEERED, "spec8"))
    report = replace(report, sides=(replace(report.sides[0], turns_to_success=NAN), *report.sides[1:]))
    show_attack(report, as_json=True)
    shown = capsys.readouterr()
    value = json.loads(shown.out, parse_constant=lambda name: pytest.fail(name))
    assert value["sides"][0]["turns_to_success"] is None
    assert value["contrasts"][0]["line"] == report.contrasts[0].line
    show_attack(replace(report, contrasts=()), as_json=False)
    assert "Nothing was compared." in capsys.readouterr().err


def test_the_command_needs_no_torch_to_start() -> None:
    for name in ("cli/show_attack.py", "report/attack.py"):
        assert not {m for m in imports(SOURCE / name, top_level=True) if m.split(".")[0] in ("torch", "transformers")}


@pytest.mark.skipif(
    not CHROMIUM.exists() or not importlib.util.find_spec("playwright"), reason="no chromium and playwright"
)
def test_in_a_browser(tmp_path: Path, page: str) -> None:
    from playwright.sync_api import sync_playwright

    many = {f"objective-{i}": f"Invented objective {i}." for i in range(100)}
    report, turns = made_up(many, seeds=5, specs=(UNSTEERED, "spec8"))
    alone_report, alone_turns = made_up(OBJECTIVES, specs=(UNSTEERED,))
    files = {name: tmp_path / f"{name}.html" for name in ("hostile", "many", "alone")}
    files["hostile"].write_text(page, encoding="utf-8")
    files["many"].write_text(render(report, turns, many, provenance()), encoding="utf-8")
    files["alone"].write_text(render(alone_report, alone_turns, OBJECTIVES, provenance()), encoding="utf-8")
    asked, said = [], []

    def count() -> int:
        return int(tab.inner_text("#count").split()[0])

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        for width in (1280, 390):
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark")
            tab.on("request", lambda request: asked.append(request.url))
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("dialog", lambda dialog: said.append(dialog.message))

            tab.goto(files["hostile"].as_uri())
            tab.wait_for_selector("#rates .main-svg")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert "</script><img" in tab.inner_text("#rates")
            assert count() == 12
            assert HOSTILE[0] in tab.inner_text("#pair .side:first-child .turns > li:first-child")
            for place in range(12):
                tab.click("#later")
                assert f"Conversation {(place + 1) % 12 + 1} of 12." in tab.inner_text("#place")
                assert tab.evaluate("document.documentElement.scrollWidth") <= width

            tab.goto(files["many"].as_uri())
            tab.wait_for_selector("#rates .main-svg")
            assert count() == 500
            assert tab.locator("#pair .side").count() == 2
            assert tab.locator(".turns > li").count() < 20, "the chosen conversation only"
            contrast = report.contrasts[0]
            tab.select_option("[name=kind]", "stopped")
            assert count() == len(contrast.stopped)
            tab.select_option("[name=kind]", "through")
            assert count() == len(contrast.let_through)
            tab.select_option("[name=kind]", "unscored")
            assert count() == contrast.left_out
            tab.select_option("[name=kind]", "")
            tab.select_option("[name=objective]", "7")
            assert count() == 5
            tab.select_option("[name=seed]", "3")
            assert count() == 1
            assert "objective-7 · seed 3" in tab.inner_text("#pair .about")
            for place, spec in enumerate((UNSTEERED, "spec8")):
                mine = conversation(Key("objective-7", 3, spec))
                items = tab.locator(f"#pair .side:nth-child({place + 1}) .turns > li")
                assert items.count() == len(mine)
                for i, one in enumerate(mine):
                    text = items.nth(i).inner_text()
                    assert one.user in text
                    assert one.reply in text
                    assert one.label in text
                    assert ("taken back" in text) == one.taken_back
                    assert (items.nth(i).get_attribute("class") == "back") == one.taken_back
            tab.select_option("[name=objective]", "")
            tab.select_option("[name=seed]", "")
            tab.select_option("[name=back]", "no")
            without = count()
            assert tab.locator(".turns .back").count() == 0
            tab.select_option("[name=back]", "yes")
            assert without + count() == 500
            assert tab.locator(".turns .back").count() > 0
            lines = tab.evaluate("getComputedStyle(document.querySelector('.back pre')).textDecorationLine")
            assert lines == "line-through"

            tab.locator("a[data-kind=stopped]").press("Enter")
            assert count() == len(contrast.stopped), "a number in a table leads to its conversations"
            tab.locator("a[data-objective='7'][data-side='1']").press("Enter")
            assert count() == 5
            tab.select_option("#talk", "2")
            assert "objective-7 · seed 2" in tab.inner_text("#pair .about")
            tab.focus("#later")
            tab.keyboard.press("Enter")
            assert "seed 3" in tab.inner_text("#pair .about")
            assert tab.evaluate("document.activeElement.id") == "later"
            tops = tab.evaluate("[...document.querySelectorAll('#pair .side')].map((one) => one.offsetTop)")
            assert (tops[0] == tops[1]) == (width == 1280), "beside each other, or below where it is narrow"
            assert tab.locator(".jump").first.is_visible() == (width == 390)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width

            tab.goto(files["alone"].as_uri())
            tab.wait_for_selector("#rates .main-svg")
            assert tab.locator("#pair .side").count() == 1
            tab.select_option("[name=kind]", "yes")
            assert count() == as_rate(alone_report.sides[0].success).k
            tab.close()
        browser.close()
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} <= {
        f"{file.as_uri()}{hash_}" for file in files.values() for hash_ in ("", "#s-talks")
    }
    assert said == []
