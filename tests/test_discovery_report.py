"""How a latent was found, on a page and in the terminal: the sentences say what the numbers say, hostile text stays
text, and nothing that was not measured becomes a number."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from test_report import CHROMIUM, EMPTY, NAN, Reader, provenance, study, talk, wilson

from demur.record import from_json, to_json
from demur.report import html
from demur.report.discovery import against_controls, against_single, render_discovery, section, standing
from demur.report.table import discovery_line, discovery_table, ranking_table
from demur.types import Discovery, Effect, Estimate, LatentRanking, LatentScore, Rate, Stability

HOSTILE = "</script><img onerror=x>"
NOTHING = Estimate(NAN, NAN, NAN, 0)


def about(value: float, half: float, n: int = 24) -> Estimate:
    return Estimate(value, value - half, value + half, n)


def effect(label: str, refusal: float, kl: float, refused: int | None = None, **changes: Any) -> Effect:
    made = Effect(
        label, (int(label.split()[1]),) if label.startswith("latent") else (), (8.0,), f"spec {label}",
        about(refusal, 0.5), about(refusal / 10, 0.2, 12), about(kl, 0.1, 12), about(refusal / kl, 2.0),
        None if refused is None else wilson(refused, 24),
    )  # fmt: skip
    return replace(made, **changes)


def discovery(**changes: Any) -> Discovery:
    """Invented, in the shape that a search has."""
    finalists = (
        effect("latent 957 at 8", 3.1, 0.41, 20, benign_refused=wilson(1, 24)),
        effect("latent 12 at 8", 2.4, 0.3, 20, benign_refused=wilson(2, 24)),
        effect("latent 40 at 4", 1.9, 0.3, 15),
    )
    controls = (
        effect("random latent 7 at 8", -0.12, 0.4),
        effect("random latent 8 at 8", 0.2, 0.05),
        effect("unrelated latent 9 at 8", 2.3, 0.9),
        effect("random direction", 0.1, 0.5),
    )
    sets = (
        effect("set of 2", 3.4, 0.1, 21, benign_refused=wilson(1, 24), latents=(957, 12), values=(4.0, 2.5)),
        effect("set of 3", 3.0, 0.9, 20, benign_refused=wilson(20, 24), latents=(957, 12, 40), values=(4.0, 4.0, 4.0)),
        effect("set of 4", 2.0, 0.4, 10),
    )
    curve = tuple(effect(f"latent 957 at {value}", value / 3, value / 30, values=(value,)) for value in (4.0, 12.0))
    details = ({"log_odds": 2.5, "log_odds_prompts": 24.0, "harmful_refused": 0.8333}, {"log_odds": 1.25}, {})
    scores = [LatentScore(957, 0.8333, details[0]), LatentScore(12, 0.75, details[1]), LatentScore(3131, NAN, {})]
    made = Discovery(
        winner=957, value=8.0, proposed_by=("attribution", "probe"),
        places={"attribution": 2, "probe": 14, "cosine": 0},
        agreement={
            "attribution": {"probe": 0.45, "cosine": 0.002},
            "probe": {"attribution": 0.45, "cosine": NAN},
            "cosine": {},
        },
        stability={
            "attribution": Stability(0.7, (1, 3)), "probe": Stability(0.55, (9, 0)), "cosine": Stability(NAN, ()),
        },
        resampled={"latent 957 at 8": 0.712, "latent 12 at 8": 0.2879, "latent 40 at 4": 0.0001},
        proposed=120, openings=("I'm sorry", "I can't\n"),
        finalists=finalists, controls=controls, sets=sets, singles=finalists[:1] * 3, curve=curve,
        ranking=LatentRanking("search", "layers.14.resid_post", "8c1f", "5f2e", tuple(scores)),
        seconds={"screen": 41.0, "answers": 160.0}, notes=("Half of the harmful prompts were refused anyway.",),
    )  # fmt: skip
    return replace(made, **changes)


def bare() -> Discovery:
    """Nothing measured but that there is a winner."""
    hole = Effect("latent 5 at 8", (5,), (8.0,), "s", NOTHING, NOTHING, NOTHING, NOTHING, EMPTY, None)
    ranking = replace(discovery().ranking, scores=())
    nothing: dict[str, Any] = {"places": {}, "agreement": {}, "stability": {}, "resampled": {}, "seconds": {}}
    return Discovery(5, NAN, (), **nothing, proposed=1, openings=(), finalists=(hole,), controls=(), sets=(),
                     singles=(), curve=(), ranking=ranking)  # fmt: skip


def printed(table: Table, width: int) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_page_shows_every_number() -> None:
    found = discovery()
    reader = Reader(render_discovery(found, provenance(kind="select")))
    text = reader.words
    assert discovery_line(found) in text
    assert "Select split; nothing here is a test result." in text
    for one in (*found.finalists, *found.controls, *found.sets, *found.curve):
        assert one.label in text
        assert one.spec in text
    assert "83 % (20/24) [64, 93]" in text
    assert "3.10 [2.60, 3.60] 24 prompts" in text
    assert "0.31 [0.11, 0.51] 12 prompts" in text
    assert "latents 957, 12 at 4, 2.5" in text
    for share in ("71 %", "29 %", "0.1 %"):
        assert share in text
    assert "judged answers to 24 harmful prompts, judged answers to 24 plain prompts, log-odds of refusing on" in text
    assert "I'm sorry, I can't↵. The log-odds" in text
    assert "attribution yes 2 70 % 1, 3" in text
    assert "probe yes 14 55 % 9, not ranked" in text
    assert "cosine no not ranked n/a n/a" in text
    assert "attribution – 45 % 0.2 %" in text
    assert "probe 45 % – n/a" in text
    assert "cosine 0.2 % n/a –" in text
    assert {value for _, name, value in reader.attributes if name == "style" and "--a" in value} == {
        "--a: 0.000",
        "--a: 0.002",
        "--a: 0.450",
    }
    assert "1 957 chosen 2.5 24 0.8333" in text
    assert "2 12 finalist 1.25" in text
    assert " 3131 " in text
    assert found.notes[0] in text
    assert "3 min 21 s" in text
    assert "demur study --values 4 8 10 12" in text
    assert "harmful_refused" in text


def test_sentences_say_what_the_numbers_say() -> None:
    found = discovery()
    line = discovery_line(found)
    assert line == (
        "Latent 957 at 8, proposed by attribution and probe (2 of 3 methods), won of 120 proposed latents: on the "
        "select split, which is no test, the model then refuses 83 % (20/24) [64, 93] of harmful prompts and 4 % "
        "(1/24) [1, 20] of plain prompts, the log-odds of refusing change by 3.10 [2.60, 3.60] on harmful and 0.31 "
        "[0.11, 0.51] on plain prompts, and KL is 0.41 [0.31, 0.51] nats per token."
    )
    said = " ".join(against_controls(found.finalists[0], found.controls))
    assert "4 controls: log-odds -0.12 to 2.30, KL 0.050 to 0.90." in said
    assert "Log-odds: of 4 intervals, the winner's lies above those of 3 and overlaps those of 1." in said
    assert (
        "KL: of 4 intervals, the winner's lies above those of 1, overlaps those of 2 and lies below those of 1." in said
    )
    assert "As 1 of 4 controls may change refusal as much" in said
    weak = (found.controls[0], found.controls[1])
    assert "larger than that of any control" in against_controls(found.finalists[0], weak)[-1]
    gap = (*weak, replace(found.controls[0], harmful=NOTHING))
    assert "any of the 2 controls that can be compared" in against_controls(found.finalists[0], gap)[-1]
    assert "not known here" in against_controls(found.finalists[0], gap[2:])[-1]


def test_sets_are_compared_only_where_they_refuse_as_much() -> None:
    found = discovery()
    two, three, four = (against_single(one, found.finalists[0]) for one in found.sets)
    assert two.startswith("set of 2 against latent 957 at 8: harmful prompts refused 88 % (21/24) [69, 96] against")
    assert "Plain refused lower: cannot tell, the intervals overlap (4 % (1/24) [1, 20] against 4 %" in two
    assert "KL lower: yes (0.10 [0.00, 0.20] against 0.41 [0.31, 0.51])." in two
    assert three.startswith("set of 3 against latent 957 at 8: harmful prompts refused 83 % (20/24)")
    assert "Plain refused lower: no, it is higher (83 %" in three
    assert "KL lower: no, it is higher" in three
    assert four.endswith("so costs are not compared.")
    unjudged = replace(found.sets[0], harmful_refused=None)
    assert "cannot tell, as refusals" in against_single(unjudged, found.finalists[0])
    unknown = replace(found.sets[0], benign_refused=None, kl=NOTHING)
    says = against_single(unknown, found.finalists[0])
    assert "cannot tell, not measured on both sides (not judged against 4 %" in says
    assert "(n/a against 0.41" in says


def test_intervals_stand_apart_or_not() -> None:
    low, high = about(1, 0.5), about(3, 0.5)
    assert [standing(high, low), standing(low, high), standing(low, about(2, 0.5))] == ["above", "below", "overlap"]
    for other in (None, NOTHING, EMPTY, Rate(0, 0, 0.0, 1.0)):
        assert standing(low, other) == standing(other, low) == "unknown"


def test_hostile_text_stays_text() -> None:
    bad = replace(discovery().finalists[0], label=HOSTILE, spec=HOSTILE)
    found = discovery(
        openings=(HOSTILE,), notes=(HOSTILE,), finalists=(bad,), controls=(bad,), sets=(bad,), singles=(bad,),
        resampled={HOSTILE: 0.5},
        proposed_by=(HOSTILE,), places={HOSTILE: 1}, agreement={HOSTILE: {HOSTILE: 1.0}},
        stability={HOSTILE: Stability(1.0, (1, 1))}, seconds={HOSTILE: 1.0},
        ranking=LatentRanking(HOSTILE, HOSTILE, HOSTILE, HOSTILE, (LatentScore(957, 1.0, {HOSTILE: 1.0}),)),
    )  # fmt: skip
    run = provenance(kind="select", name=HOSTILE)
    pages = (render_discovery(found, run), html.render(study(), run, *talk(study()), found))
    for page, scripts in zip(pages, (3, 4), strict=True):
        assert HOSTILE not in page
        reader = Reader(page)
        assert len([tag for tag, _ in reader.blocks if tag == "script"]) == scripts
        assert not {"img", "svg"} & {tag for tag, _, _ in reader.attributes}
        assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
        assert reader.text.count(HOSTILE) > 15
        for _, name, value in reader.attributes:
            if name in ("src", "href", "action", "srcset", "data", "poster", "background"):
                assert value.startswith(("#", "data:"))
        policy = next(value for _, _, value in reader.attributes if value.startswith("default-src"))
        assert "default-src 'none'" in policy
        assert "http" not in policy
    odd = replace(bad, label="[/red] [bold]")
    assert "[/red] [bold]" in printed(discovery_table(discovery(finalists=(odd,)), 200), 200)


def test_what_was_not_measured_is_no_number() -> None:
    page = Reader(render_discovery(bare(), provenance(kind="select", dirty=False, config={}, versions={})))
    for _, text in page.blocks:
        if text.startswith("{"):
            json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert "nan" not in page.words.lower().replace("provenance", "")
    for missing in ("No control was measured", "Not measured at other values", "No method ranked latents", "n/a (0/0)"):
        assert missing in page.words
    assert "Sets of latents" not in page.words
    assert not [value for _, name, value in page.attributes if name == "aria-label" and value == "Sets of latents"]
    assert "proposed by no method, won of 1 proposed latent:" in discovery_line(bare())
    assert "n/a" in printed(discovery_table(bare(), 120), 120)
    empty = replace(bare(), finalists=())
    assert "no answer under it was judged" in discovery_line(empty)
    assert "No finalist was judged" in Reader(render_discovery(empty, provenance())).words
    assert printed(discovery_table(empty, 80), 80)
    holes = discovery(curve=(replace(discovery().curve[0], harmful=NOTHING, benign=NOTHING, kl=NOTHING),), finalists=())
    assert section(holes).figures == {}
    assert "Not measured." in Reader(render_discovery(holes, provenance())).words


def test_without_sets_there_is_no_table_of_sets() -> None:
    for found, there in ((discovery(), True), (discovery(sets=(), singles=()), False)):
        attributes = Reader(render_discovery(found, provenance())).attributes
        assert (("div", "aria-label", "Sets of latents") in attributes) == there


def test_the_figures_hold_the_winner_at_every_value() -> None:
    found = section(discovery())
    assert [one.values[0] for one in found.curve] == [4, 8, 12]
    harmful, benign = found.figures["curve-refusal"]["data"]
    assert list(harmful["y"]) == pytest.approx([4 / 3, 3.1, 4])
    assert list(harmful["error_y"]["array"]) == pytest.approx([0.5] * 3)
    assert [trace["meta"]["role"] for trace in (harmful, benign)] == ["steered", "control"]
    assert found.figures["curve-kl"]["layout"]["yaxis"]["rangemode"] == "tozero"


def test_in_the_study_the_discovery_stands_for_the_candidates() -> None:
    with_it = html.render(study(), provenance(), *talk(study()), discovery=discovery())
    without = html.render(study(), provenance(), *talk(study()))
    for page, there in ((with_it, True), (without, False)):
        ids = [value for _, name, value in Reader(page).attributes if name == "id"]
        assert len(ids) == len(set(ids))
        assert ("s-discovery" in ids, "s-candidates" in ids) == (there, not there)
        blocks = [text for _, text in Reader(page).blocks if text.startswith("{")]
        drawn = next(set(data) for data in map(json.loads, blocks) if "tradeoff" in data)
        assert drawn <= set(ids), "every figure has a place"
        assert ("curve-kl" in drawn, "candidates" in drawn) == (there, not there)
    assert discovery_line(discovery()) in Reader(with_it).words


@pytest.mark.parametrize("width", [80, 100, 120, 180])
def test_terminal_tables_fit(width: int) -> None:
    text = printed(discovery_table(discovery(), width), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for part in ("83 %", "(20/24)", "[64, 93]", "3.10", "[2.60, 3.60]", "71 %"):
        assert part in text
    assert ("7.56" in text) == (width > 80)
    assert ("83 % (20/24) [64, 93]" in text) == (width == 180)
    assert "Nothing here is a test result." in " ".join(text.split())
    short = replace(discovery().ranking, method="probe", scores=discovery().ranking.scores[:1])
    ranks = printed(ranking_table([discovery().ranking, short], 2, width), width)
    assert "957  0.8333" in ranks
    assert "3 ranked" in ranks
    assert "3131" not in ranks
    assert ranks.count("957") == 2
    assert "place" in printed(ranking_table([], 5), width)


def test_round_trip() -> None:
    whole = replace(discovery(), agreement={"a": {"b": 0.5}}, stability={"a": Stability(0.5, (0, 2))})
    whole = replace(whole, ranking=replace(whole.ranking, scores=whole.ranking.scores[:2]))
    assert from_json(Discovery, json.loads(json.dumps(to_json(whole)))) == whole
    for gaps in (discovery(), bare()):
        assert repr(from_json(Discovery, json.loads(json.dumps(to_json(gaps))))) == repr(gaps)


@pytest.mark.skipif(
    not CHROMIUM.exists() or not importlib.util.find_spec("playwright"), reason="no chromium and playwright"
)
def test_in_a_browser(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    file = tmp_path / "discovery.html"
    file.write_text(render_discovery(discovery(openings=(HOSTILE,)), provenance(kind="select")), encoding="utf-8")
    asked, said = [], []
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        for width in (1280, 360):
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
            tab.on("request", lambda request: asked.append(request.url))
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.goto(file.as_uri())
            tab.wait_for_selector("#curve-kl .main-svg")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            shades = tab.locator(".shaded td").evaluate_all(
                "all => all.map(one => getComputedStyle(one).backgroundColor)"
            )
            assert len(set(shades)) > 1
            tab.click("#theme")
            assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
            tab.close()
        browser.close()
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [file.as_uri()] * 2
    assert said == []
