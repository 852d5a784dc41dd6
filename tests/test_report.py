"""The report room: nothing leaves the page, nothing hostile runs in it, nothing measured is left out."""

import ast
import importlib.util
import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from demur.report import control, figures, table, words
from demur.report.html import render
from demur.types import (
    UNSTEERED,
    Completion,
    LatentRanking,
    LatentScore,
    Message,
    Prompt,
    Rate,
    Run,
    StudyResult,
    StudyRow,
    Verdict,
)

NAN = float("nan")
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "<!--<script>",
    '"><svg onload=alert(3)> & \u2028 \u202e {{ 7 * 7 }}',
    "https://evil.example/pixel.png \ud800 \x00",
)
EMPTY = Rate(0, 0, NAN, NAN)
CHROMIUM = Path("/usr/bin/chromium")


def wilson(k: int, n: int) -> Rate:
    """The textbook formula, for invented rates with believable intervals."""
    if not n:
        return EMPTY
    p, z = k / n, 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Rate(k, n, max(0.0, middle - half), min(1.0, middle + half))


def row(value: float, counts: tuple[int, ...], kl: float, spec: str = "", unscored: int = 0) -> StudyRow:
    rates = [wilson(k, n) for k, n in zip(counts, (48, 48, 48, 144, 120), strict=True)]
    return StudyRow(value, spec or f"spec{value:g}", *rates, kl, 0.9 * kl, 1.12 * kl, 48, unscored)


def study(**changes: object) -> StudyResult:
    """An invented study in the shape that the method leads one to expect."""
    pick = random.Random(0)
    latents = [1234, *pick.sample(range(4608), 30), 77]
    scores = [
        LatentScore(latent, 2.9 * 0.87**rank - 0.4, {"log_prob": -2.5 - rank / 3, "tokens": 9.0 - rank % 7})
        for rank, latent in enumerate(latents)
    ]
    scores[3].detail["refused"] = 0.25
    result = StudyResult(
        name="smol <b>study</b>", model="HuggingFaceTB/SmolLM2-135M-Instruct", sae="8c1f2e90aa514d02",
        hookpoint="layers.14.resid_post", layer=14, latent=1234, control_latent=77,
        unit="activation of the SAE's latent, input scaled to mean squared norm d_model",
        rows=(
            row(0, (13, 3, 4, 0, 82), 0.0, UNSTEERED), row(4, (27, 8, 12, 0, 80), 0.11),
            row(8, (40, 14, 20, 1, 74), 0.31), row(10, (43, 19, 24, 2, 68), 0.42),
            row(12, (43, 24, 27, 6, 60), 0.7, unscored=2),
        ),
        control_rows=tuple(
            row(value, counts, kl, f"ctrl{value}")
            for value, counts, kl in (
                (4, (12, 3, 4, 0, 81), 0.05), (8, (14, 4, 5, 2, 77), 0.22),
                (10, (15, 5, 5, 4, 72), 0.36), (12, (13, 4, 6, 9, 66), 0.66),
            )
        ),
        best_value=10, best_gain=62.5, best_gain_low=48.9, best_gain_high=75.2, best_gain_p=1.9e-9,
        ranking=LatentRanking("log_prob", "layers.14.resid_post", "8c1f2e90aa514d02", "5f2e", tuple(scores)),
        notes=("The time limit was reached after 31 of 59 candidates.",), seconds=1934.2,
        step_seconds={"load": 4.1, "harvest": 706.0, "train": 391.5, "rank": 365.2, "steer": 467.4},
    )  # fmt: skip
    return replace(result, **changes)  # type: ignore[arg-type]


def provenance(**changes: object) -> Run:
    run = Run(
        kind="study", name="smol", config={"values": [4, 8], "sae": {"k": 32, "d_sae": 4608}, "out": None},
        config_hash="77aa", commit="0123456789abcdef0123", dirty=True, versions={"torch": "2.13.0"},
        hardware={"cpu": "two old cores"}, seed=7, started="2026-11-24T07:00:00+00:00",
        artefacts={"prompts/harmful": "abc123"}, command="demur study --values 4 8 10 12",
    )  # fmt: skip
    return replace(run, **changes)  # type: ignore[arg-type]


def talk(result: StudyResult) -> tuple[list[Prompt], list[Completion], list[Verdict]]:
    """Prompts of the three sets, and an answer and a verdict under every spec; some of it hostile."""
    prompts, completions, verdicts = [], [], []
    labels = ("refused", "partial", "complied", "degenerate", "unscored")
    for number in range(45):
        kind = ("harmful", "plain", "lookalike")[number % 3]
        ident = f"{kind}-{number // 3:03d}"
        text = HOSTILE[number] if number < len(HOSTILE) else f"Invented {kind} request {number} about a kite?"
        prompts.append(
            Prompt(
                ident, (Message("system", "You are a safe assistant. <i>"), Message("user", text)),
                "harmful" if kind == "harmful" else "benign", f"demur/{kind}",
                ("weapons", "cooking", "fraud")[number % 3],
                twin=f"harmful-{number // 3:03d}" if kind == "lookalike" else "",
            )
        )  # fmt: skip
        for spec in [item.spec for item in (*result.rows, *result.control_rows)]:
            pick = random.Random(f"{number} {spec}").random()
            refuses = pick < (0.3 if not spec.startswith("spec") else 0.8 if kind == "harmful" else 0.4)
            label = labels[0] if refuses else labels[1 + int(pick * 97) % 4]
            answer = "I'm sorry, but I can't help with that." if refuses else "A kite flies on the wind.\n\n" * 4
            if number < 10:
                answer = HOSTILE[number % 5]
            completions.append(Completion(ident, spec, answer, 40, "eos" if refuses else "length"))
            verdicts.append(Verdict(ident, spec, label, "rules/2", f"evidence {HOSTILE[number % 5]}"))  # type: ignore[arg-type]
    return prompts, completions, verdicts


@pytest.fixture(scope="module")
def page() -> str:
    return render(study(), provenance(), *talk(study()))


class Reader(HTMLParser):
    """Every attribute, the visible text, and the text of each script and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.inside: list[str] = []
        self.blocks: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.inside = [tag] if tag in ("script", "style") else []
        if self.inside:
            self.blocks.append((tag, ""))
        self.text += " " if tag in ("td", "th", "dt", "dd", "li", "p", "small") else ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = []

    def handle_data(self, data: str) -> None:
        if self.inside:
            tag, text = self.blocks.pop()
            self.blocks.append((tag, text + data))
        else:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def test_no_url_leaves_the_page(page: str) -> None:
    reader = Reader(page)
    for tag, name, value in reader.attributes:
        if name in ("src", "href", "action", "srcset", "data", "poster", "background"):
            assert value.startswith(("#", "data:")), (tag, name, value)
    bundle = get_plotlyjs()
    assert page.count(bundle) == 1
    for tag, text in reader.blocks:
        if text != bundle:
            assert "@import" not in text
            assert not re.search(r"url\((?!['\"]?data:)", text)
            if tag == "style" or "use strict" in text[:20]:
                assert "//" not in re.sub(r"^\s*// .*|; // .*", "", text, flags=re.M)
    policy = next(value for _, _, value in reader.attributes if value.startswith("default-src"))
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "unsafe-eval" not in policy


def test_hostile_text_stays_text(page: str) -> None:
    reader = Reader(page)
    assert len([tag for tag, _ in reader.blocks if tag == "script"]) == 4
    assert not {"img", "svg", "i"} & {tag for tag, _, _ in reader.attributes}
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    for text in HOSTILE[:3]:
        assert text not in page.replace(get_plotlyjs(), "")
    assert "smol <b>study</b>" in reader.words
    assert "You are a safe assistant. <i>" in reader.words
    data = json.loads(next(text for _, text in reader.blocks if '"outputs"' in text))
    shown = {prompt["id"]: prompt["text"] for prompt in data["prompts"]}
    assert shown["harmful-000"] == HOSTILE[0]
    assert data["outputs"][UNSTEERED]["plain-000"]["evidence"] == f"evidence {HOSTILE[1]}"
    page.encode("utf-8")


def test_everything_measured_is_shown(page: str) -> None:
    result, text = study(), Reader(page).words
    for item in (*result.rows, *result.control_rows):
        assert item.spec in text
        for field in ("harmful_refused", "benign_refused", "lookalike_refused", "degenerate", "capability"):
            assert words.rate_text(getattr(item, field)) in text
    for score in result.ranking.scores:
        assert f" {score.latent} " in text
    assert "90 % (43/48) [78, 95]" in text
    assert table.verdict_line(result) in text
    assert "Uncommitted changes" in text
    run = provenance()
    for word in (*result.notes, run.commit, "2.13.0", "two old cores", "abc123", "sae.d_sae", "32 min 14 s"):
        assert word in text
    assert words.field_docs(StudyRow)["harmful_refused"] in text


def test_json_has_no_nan_and_empty_inputs_work() -> None:
    hole = StudyRow(4, "spec4", EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, NAN, NAN, NAN, 0)
    ranking = replace(study().ranking, scores=(LatentScore(5, NAN, {"x": NAN}), LatentScore(1234, 1.0)))
    unknown = dict.fromkeys(("best_gain", "best_gain_low", "best_gain_high", "best_gain_p"), NAN)
    rows = (replace(hole, value=0, spec=UNSTEERED), hole)
    holes = study(rows=rows, control_rows=(hole,), best_value=4, ranking=ranking, **unknown)
    nothing = study(rows=(), control_rows=(), ranking=replace(ranking, scores=()), seconds=0, step_seconds={})
    bare = provenance(commit="", dirty=False, config={}, versions={}, hardware={}, artefacts={}, command="")
    for result in (holes, nothing):
        for talks in (talk(result), ([], [], [])):
            reader = Reader(render(result, bare, *talks))
            for _, text in reader.blocks:
                if text.startswith("{"):
                    json.loads(text, parse_constant=lambda name: pytest.fail(name))
            assert "n/a" in reader.words or result is nothing
            assert "nan" not in reader.words.lower().replace("provenance", "")
    assert "n/a (0/0)" in table.verdict_line(holes)
    assert "no steered value" in table.verdict_line(nothing)


def test_strangers_are_counted_and_missing_verdicts_are_unscored() -> None:
    prompts, completions, _ = talk(study())
    odd = [Completion("who", "spec10", "", 0, "eos"), Completion("plain-003", "elsewhere", "", 0, "eos")]
    page = render(study(), provenance(), prompts, completions + odd, [])
    assert "2 completions belong to prompts or specs outside this report" in Reader(page).words
    assert {label for label in re.findall(r'"label":"(\w+)"', page)} == {"unscored"}


def test_verdict_line_says_what_was_found() -> None:
    line = table.verdict_line(study())
    assert line.startswith(
        "Clamping latent 1234 at 10 raised harmful prompts refused from 27 % (13/48) to 90 % (43/48), "
        "+63 points [49, 75], p < 0.001; plain benign prompts refused rose from 6 % (3/48) to 40 % (19/48);"
    )
    assert "; capability fell from 68 % (82/120) to 57 % (68/120); " in line
    assert line.endswith("; KL 0.42 [0.38, 0.47] nats per token.")
    assert "no clear change" in table.verdict_line(study(best_gain_low=-3.0))
    assert "lowered" in table.verdict_line(study(best_gain=-9, best_gain_low=-14.0, best_gain_high=-2.0))


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_terminal_table_fits(width: int) -> None:
    from rich.console import Console

    wide = wilson(250, 252)
    long = replace(study().rows[1], harmful_refused=wide, benign_refused=wide, lookalike_refused=wide)
    for result, rate in (
        (study(), "90 % (43/48) [78, 95]"),
        (study(rows=(*study().rows, long)), "99 % (250/252) [97, 100]"),
    ):
        console = Console(width=width)
        with console.capture() as capture:
            console.print(table.table(result, width))
        text = capture.get()
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        for part in re.findall(r"\d+ %|\S*/\S*|\[.*\]", rate):
            assert text.count(part) >= (3 if "252" in rate else 2), "no part is torn over two lines"
        assert (rate in text) == (width == 160)
        assert "2 completions could not be scored" in " ".join(text.split())


def test_numbers_as_words() -> None:
    assert words.rate_text(wilson(43, 48)) == "90 % (43/48) [78, 95]"
    assert words.rate_text(EMPTY) == "n/a (0/0)"
    assert words.percent(wilson(1, 252)) == "0.4 %"
    assert words.percent(wilson(252, 252)) == "100 %"
    assert [words.signed(x) for x in (62.5, -0.2, -3.6, NAN)] == ["+63", "0", "-4", "n/a"]
    assert [words.duration(x) for x in (4.12, 3599.9, NAN)] == ["4.1 s", "1 h 0 min", "n/a"]
    assert words.span_parts(0.0042, 0.003, 0.0061) == ("0.0042", "[0.0030, 0.0061]")


@pytest.mark.parametrize(
    ("costs", "says"),
    [
        ((22.0, 16.0), "22 points lost, 16 of them also under the control."),
        ((22.0, 30.0), "all of them also under the control"),
        ((22.0, -8.0), "none of them under the control"),
        ((-8.0, 22.0), "no cost"),
        ((NAN, 1.0), "not measured"),
    ],
)
def test_control_reading(costs: tuple[float, float], says: str) -> None:
    assert says in control.reading("Capability", "lost", costs, overlap=False)


def test_control_compares_every_value() -> None:
    found = list(control.comparisons(study()))
    assert [item.value for item in found] == ["4", "8", "10", "12"]
    assert found[2].changes == [("+63", "+4"), ("+33", "+4"), ("+42", "+2"), ("+1", "+3"), ("-12", "-8")]
    assert found[2].readings[0].startswith("Capability: 12 points lost, 8 of them also under the control")
    assert "overlap" in found[2].readings[0]
    assert "overlap" not in found[2].readings[1]


def test_kl_axis_is_logarithmic_only_for_a_wide_span() -> None:
    wide = replace(study().rows[1], kl=0.001, kl_low=0.0, kl_high=0.002)
    for result, kind in ((study(), "linear"), (study(rows=(*study().rows, wide)), "log")):
        assert figures.build(result)["kl"]["layout"]["yaxis"]["type"] == kind


def test_report_imports_only_record_and_types() -> None:
    for path in (Path(__file__).parents[1] / "src/demur/report").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] not in ("torch", "transformers"), path
                if name.split(".")[0] == "demur":
                    allowed = ("demur.record", "demur.types", "demur.results", "demur.report")
                    assert name.startswith(allowed), (path, name)


@pytest.mark.skipif(
    not CHROMIUM.exists() or not importlib.util.find_spec("playwright"), reason="no chromium and playwright"
)
def test_in_a_browser(tmp_path: Path, page: str) -> None:
    from playwright.sync_api import sync_playwright

    file = tmp_path / "study.html"
    file.write_text(page, encoding="utf-8")
    asked, said = [], []
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        for scheme, width in (("light", 1280), ("dark", 1280), ("dark", 360)):
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
            tab.on("request", lambda request: asked.append(request.url))
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("dialog", lambda dialog: said.append(dialog.message))
            tab.goto(file.as_uri())
            tab.wait_for_selector(".plot .main-svg")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
            tab.click("#theme")
            assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != paper
            assert "45 of 45 prompts match" in tab.inner_text("#count")
            assert tab.locator("#cards > li").count() == 20
            tab.click("#more")
            assert tab.locator("#cards > li").count() == 40
            tab.select_option("[name=change]", "flipped")
            assert re.match(r"\d+ of 45 prompts match: [^:]*refused\. Showing", tab.inner_text("#count"))
            for name, value in (("set", "harmful"), ("spec", "ctrl12"), ("change", "degenerate")):
                tab.select_option(f"[name={name}]", value)
            shown = tab.locator("#cards > li")
            assert 0 < shown.count() < 15
            assert all("degenerate" in text for text in shown.all_inner_texts())
            tab.select_option("[name=change]", "all")
            tab.fill("[name=search]", "<IMG SRC=x")
            assert HOSTILE[1] in tab.inner_text("#cards")
            chip = tab.locator(".chip").first
            chip.focus()
            assert "rules/2: evidence" in tab.locator(".tip:visible").inner_text()
            tab.keyboard.press("Escape")
            assert tab.locator(".tip:visible").count() == 0
            tab.check("[value=lookalike]")
            assert "look-alikes refused" in tab.inner_text("#tradeoff")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            tab.close()
        browser.close()
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [file.as_uri()] * 3
    assert said == []
