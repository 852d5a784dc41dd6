"""Comparisons and evaluations as tables and as a page: every number is shown, what was not measured is none, and
nothing that people or models wrote does anything."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from test_report import CHROMIUM, HOSTILE, NAN, Reader, provenance, wilson

from demur.report import compare_table
from demur.report.compare_table import as_latex, as_markdown, as_table, evaluation_markdown, evaluation_table
from demur.report.comparison import Talk, forest, render
from demur.results import Comparison, Contrast, Damage, Evaluation, Side, SuiteRates, TaskScore
from demur.types import UNSTEERED, Completion, Estimate, Label, Message, Prompt, Verdict

RULES, MODEL = "rules/2", "wildguard@tiny"
BASE, STEERED = Side(UNSTEERED, UNSTEERED, "runs/a"), Side("latent 957 at 8", "spec8", "runs/a")
LABELS: tuple[Label, ...] = ("refused", "partial", "complied", "degenerate", "unscored")
EVIL = "</script><img src=x onerror=alert(1)> | \u202e \ud800 \x1b[31m $x_1$ 100% & {a}~^\\ [2] *b* `c` #\nend"


def contrast(what: str, before: float, after: float, half: float, **changes: Any) -> Contrast:
    """An invented one; its interval reaches `half` to both sides."""
    gain = after - before
    made = Contrast(
        what, "refusal", "share", "more", Estimate(before, before - 0.05, before + 0.05, 250),
        Estimate(after, after - 0.05, after + 0.05, 250), Estimate(gain, gain - half, gain + half, 250),
        0.0002, 0.0012, 0, (0, 0), (0, 0), ("a",), ("b", "c"), 0, 0.06, None, "open",
        f"{what}: {100 * before:.1f} to {100 * after:.1f} %",
    )  # fmt: skip
    return replace(made, **changes)


def comparison(**changes: Any) -> Comparison:
    made = Comparison(
        BASE,
        STEERED,
        (
            contrast("harmbench, harmful refused", 0.264, 0.872, 0.06, verdict="better"),
            contrast("xstest under prefix_injection, benign refused", 0.08, 0.144, 0.036, better="less",
                     verdict="worse", left_out=3, p_holm=0.04),
            contrast("degenerate answers", 0.0, 0.0, 0.016, better="less", p=1.0, p_holm=1.0, detectable=NAN),
            contrast("mmlu acc", 0.301, 0.299, 0.01, kind="task", kept=True, verdict="kept", p_holm=1.0),
            contrast("truthfulqa_gen bleu_max", 23.5, 21.25, 4.0, kind="task", unit="other", kept=False, p_holm=NAN),
        ),
        0.02,
        RULES,
    )  # fmt: skip
    return replace(made, **changes)


def nothing(what: str = "xstest, harmful refused") -> Contrast:
    """No pair was scored on both sides."""
    hole = Estimate(NAN, NAN, NAN, 0)
    return contrast(what, 0.5, 0.5, 0.1, base=hole, steered=hole, difference=hole, p=1.0, p_holm=1.0, detectable=NAN)


def printed(table: Table, width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_and_tears_no_number(width: int) -> None:
    other = replace(comparison(), steered=replace(STEERED, label="latent 12 at 100", spec="other"))
    text = printed(as_table([comparison(), other], width), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for part in ("26.4 %", "87.2 %", "+60.8", "[54.8, 66.8]", "0.001", "0.040", "n/a", "23.5", "-2.25", "kept", "250"):
        assert text.count(part) >= 2, part
    assert ("+60.8 [54.8, 66.8]" in text) == (width == 160)
    flat = " ".join(text.split())
    assert "latent 12 at 100" in flat
    assert "Left out, as unscored on a side: 3 of xstest under prefix_injection, benign refused." in flat
    assert "kept: a loss of 2 points or more is excluded." in flat


def test_rows_whose_interval_holds_0_are_dim() -> None:
    table = as_table([comparison(contrasts=(*comparison().contrasts, nothing()))], 160)
    assert [row.style for row in table.rows] == ["bold", "", "", "dim", "dim", "dim", "dim"]
    rows = compare_table.blocks([comparison()])[0].rows
    assert [row.better for row in rows] == ["↑", "↓", "↓", "↑", "↑"]
    assert rows[2][2:7] == ("0.0 %", "0.0 %", "+0.0", "[-1.6, 1.6]", "250")
    assert rows[0].p == "0.001"
    assert compare_table.blocks([comparison(contrasts=(nothing(),))])[0].rows[0][2:6] == ("n/a", "n/a", "n/a", "")


def test_lines_name_the_side_where_there_are_several() -> None:
    one, two = comparison(), replace(comparison(), steered=replace(STEERED, run="runs/b"))
    assert compare_table.lines([one]) == [each.line for each in one.contrasts]
    said = compare_table.lines([one, two])
    assert len(said) == 10
    assert said[0] == f"latent 957 at 8 (runs/a): {one.contrasts[0].line}"
    assert said[5] == f"latent 957 at 8 (runs/b): {one.contrasts[0].line}"


def test_markdown_keeps_its_columns_whatever_the_names() -> None:
    hostile = comparison(
        steered=replace(STEERED, label=EVIL), contrasts=(contrast(EVIL, 0.1, 0.3, 0.1), nothing("a|b"))
    )
    for text, columns in ((as_markdown([hostile]), 8), (evaluation_markdown(evaluation(name=EVIL)), 6)):
        text.encode()
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len(rows) >= 4
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {columns + 1}
        assert not re.search(r"(?<!\\)[<`~]", re.sub(r"\| < 0.001 ", "", text))
        assert not {"\x1b", "\u202e", "\r"} & set(text)
    assert "| harmbench, harmful refused | ↑ | 26.4 % | 87.2 % | **+60.8** [54.8, 66.8] | 250 | 0.001 | better |" in (
        as_markdown([comparison()])
    )
    assert as_markdown([]) == "Nothing was compared.\n"


def test_latex_is_escaped_and_needs_booktabs_only() -> None:
    hostile = comparison(
        base=replace(BASE, label=EVIL), steered=replace(STEERED, label=EVIL, spec="x"),
        contrasts=(contrast(EVIL, 0.1, 0.3, 0.1), contrast("[2] a--b", 0.3, 0.1, 0.3, p_holm=0.0), nothing()),
    )  # fmt: skip
    for made in ([comparison()], [hostile], [hostile, comparison()]):
        text = as_latex(made)
        text.encode()
        body = [line for line in text.splitlines() if not line.startswith("%")]
        assert body[0] == r"\begin{tabular}{lcrrrrrl}"
        assert body[-1] == r"\end{tabular}"
        assert set(re.findall(r"\\(\w+rule)", text)) == {"toprule", "midrule", "bottomrule"}
        for line in body[2:-2]:
            if line == r"\midrule":
                continue
            assert line.endswith(r" \\")
            bare = re.sub(r"\\.", "", line)  # what is left has its meaning in TeX
            assert bare.count("{") == bare.count("}")
            assert bare.count("$") % 2 == 0
            assert bare.count("&") == (0 if "multicolumn" in line else 7), line
            assert not set(bare) & set("%#~")
            assert not re.search(r"[_^]", re.sub(r"\$[^$]*\$", "", bare))
            assert not line.startswith(("[", "*"))
    text = as_latex([comparison()])
    assert r"\multicolumn{8}{l}{\emph{latent 957 at 8} against unsteered} \\" in text
    assert (
        r"prefix\_injection, benign refused & $\downarrow$ & 8.0 \% & 14.4 \% & $\mathbf{+6.4}$ $[2.8, 10.0]$ &" in text
    )
    assert r" & 250 & $0.040$ & worse \\" in text
    assert r"n/a & n/a & n/a & 0 & $1.000$ & open \\" in as_latex([hostile])
    assert r"{[}2{]} a-{}-b" in as_latex([hostile])
    assert as_latex([]).startswith("% Nothing was compared.\n")


def evaluation(name: str = "xstest", **changes: Any) -> Evaluation:
    sides = (BASE, STEERED)
    made = Evaluation(
        "smol", "tiny (hub, weights abc)", RULES, sides,
        tuple(
            SuiteRates(suite, intent, wrapper, side.spec, wilson(k, 250), wilson(0, 250), {"unscored": 4, "refused": k},
                       tokens)
            for side, k, tokens in zip(sides, (20, 218), (51.25, NAN), strict=True)
            for suite, intent, wrapper in ((name, "benign", ""), ("demur/harmful", "harmful", "base64"))
        ),
        (
            *(TaskScore("mmlu", "acc", side.spec, Estimate(0.3012, 0.28, 0.3224, 1140)) for side in sides),
            TaskScore("odd", "bleu", UNSTEERED, Estimate(23.0, NAN, NAN, 1)),
        ),
        tuple(
            Damage(side.spec, *[Estimate(0.042, 0.03, 0.061, 40)] * 2, Estimate(17.3, 15.0, 20.1, 200))
            for side in sides
        ),
        {"harmful": 20, "mmlu": 20}, {"answers": 3.0}, ("a note | here",),
    )  # fmt: skip
    return replace(made, **changes)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_evaluation_fits_and_says_loudly_what_is_limited(width: int) -> None:
    text = printed(evaluation_table(evaluation(), width), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for part in ("87 %", "(218/250)", "[82, 91]", "51.2", "30.1 %", "(1140 documents)", "[28.0, 32.2]", "0.042",
                 "17.30", "[0.030, 0.061]", "[15.00, 20.10]", "23.00", "(200 texts)", "(1 document)",
                 "n/a"):  # fmt: skip
        assert part in text, part
    flat = " ".join(text.split())
    assert flat.startswith("LIMITED: only 20 of harmful and only 20 of mmlu a subject.")
    assert text.count("only 20") == 4
    marked = evaluation_markdown(evaluation())
    assert marked.startswith("**LIMITED: only 20 of harmful and only 20 of mmlu a subject.")
    assert (
        "| mmlu acc **(only 20 a subject)** | unsteered | 30.1 % (1140 documents) [28.0, 32.2] | - | - | - |" in marked
    )
    assert (
        "| demur/harmful under base64, harmful refused **(only 20)** | latent 957 at 8 | 87 % (218/250) [82, 91] | 0 %"
    )
    assert "a note \\| here" in marked


def test_what_is_measured_on_several_sides_stands_together() -> None:
    found = compare_table.evaluation_lines(evaluation())
    assert [line.side for line in found[:8]] == [BASE.label, STEERED.label] * 3 + [BASE.label, BASE.label]
    assert [line.what for line in found[:4]] == ["xstest, benign refused"] * 2 + [
        "demur/harmful under base64, harmful refused"
    ] * 2
    assert {line.unscored for line in found[:4]} == {"4"}
    bare = evaluation(suites=(), tasks=(), damage=(), limits={}, notes=(), judge="")
    assert "LIMITED" not in evaluation_markdown(bare) + printed(evaluation_table(bare, 80), 80)


def talks(hostile: bool = True) -> list[Talk]:
    """Two runs: the second has a side of the same name and spec, other prompts too, and a second judge."""
    prompts = [
        Prompt(
            f"p{i}", (Message("user", HOSTILE[i] if hostile and i < 5 else f"Invented request {i} about a kite?"),),
            "harmful" if i % 2 else "benign", ("demur/harmful", "xstest")[i % 2], ("fraud", EVIL)[i % 3 == 0],
            wrapper="base64" if i > 20 else "",
        )
        for i in range(30)
    ]  # fmt: skip
    extra = Prompt("constructor", (Message("user", "Only in the second run."),), "benign", "xstest", "fraud")

    def answers(side: Side, some: list[Prompt], turn: int) -> list[Completion]:
        texts = [HOSTILE[n] if n < 5 else f"{side.run} {side.label} {p.id}" for n, p in enumerate(some)]
        return [Completion(p.id, side.spec, texts[n], n + turn, "eos") for n, p in enumerate(some)]

    def verdicts(side: Side, judge: str, turn: int) -> list[Verdict]:
        return [Verdict(p.id, side.spec, LABELS[(n + turn) % 5], judge, HOSTILE[n % 5]) for n, p in enumerate(prompts)]

    first = [*answers(BASE, prompts, 0), *answers(STEERED, prompts, 100), Completion("damage", UNSTEERED, "", 0, "eos")]
    judged = [*verdicts(BASE, RULES, 0), *verdicts(STEERED, RULES, 1)]
    again = replace(BASE, run="runs/b")
    second = answers(again, [*prompts[:10], extra], 200)
    by_two = [*verdicts(again, RULES, 0), *[replace(v, harmful="yes") for v in verdicts(again, MODEL, 1)]]
    return [
        Talk(BASE, prompts, first, judged),
        Talk(STEERED, prompts, first, judged),
        Talk(again, [*prompts, extra], second, by_two),
    ]


def three_sides(**changes: Any) -> list[Comparison]:
    return [comparison(**changes), comparison(steered=replace(BASE, run="runs/b"), **changes)]


@pytest.fixture(scope="module")
def page() -> str:
    hostile = three_sides(contrasts=(*comparison().contrasts, contrast(EVIL, 0.1, 0.4, 0.1, verdict="better")))
    return render(hostile, talks(), provenance(kind="eval", name=EVIL), [f"note {EVIL}"], RULES)


def blocks_of(page: str) -> list[dict[str, Any]]:
    found = [text for _, text in Reader(page).blocks if text.startswith("{")]
    return [json.loads(text, parse_constant=lambda name: pytest.fail(name)) for text in found]


def test_hostile_text_stays_text(page: str) -> None:
    page.encode()
    reader = Reader(page)
    assert len([tag for tag, _ in reader.blocks if tag == "script"]) == 4
    assert not {"img", "svg", "i"} & {tag for tag, _, _ in reader.attributes}
    for tag, name, value in reader.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "action", "srcset", "data", "poster", "background"):
            assert value.startswith(("#", "data:")), (tag, value)
    assert "<img src" not in page
    assert reader.text.count("<img src=x onerror=alert(1)> |") >= 5
    policy = next(value for _, _, value in reader.attributes if value.startswith("default-src"))
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    drawn, said = blocks_of(page)
    shown = {prompt["id"]: prompt["text"] for prompt in said["prompts"]}
    assert [shown[f"p{i}"] for i in range(4)] == list(HOSTILE[:4])
    assert not {"\u202e", "\x1b"} & set("".join(text for prompt in said["prompts"] for text in prompt["about"]))
    names = [note["text"] for plot in drawn.values() for note in plot["layout"]["annotations"]]
    assert not [name for name in names if "<" in name]
    assert len([name for name in names if "&lt;/script&gt;&lt;img" in name]) == 2
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(drawn) == {"forest-0", "forest-1"} <= set(ids), "every figure has a place"


def test_every_number_is_on_the_page(page: str) -> None:
    text = Reader(page).words
    for each in comparison().contrasts:
        assert text.count(each.line) == 2
    for row in compare_table.blocks([comparison()])[0].rows:
        interval = f" {row.interval}" if row.interval else ""
        assert f"{row.what} {row.better} {row.base} {row.steered} {row.difference}{interval} {row.n}" in text
    assert "250 +2 −1 0.040 (< 0.001) 6.0 worse" in text
    assert "Left out, as unscored on a side: 3 of xstest" in text
    for word in ("unsteered (runs/b)", "demur study --values 4 8 10 12", "two old cores", "abc123", "Judge rules/2"):
        assert word in text
    assert "Ranking" not in text
    assert "Time" not in text
    assert text.index("harmbench, harmful refused") < text.index("Uncommitted changes") < text.index("All contrasts")


def test_sides_of_two_runs_are_told_apart_and_every_judge_is_shown() -> None:
    _, said = blocks_of(page := render(three_sides(), talks(), provenance(), [], RULES))
    assert said["base"] == {"key": "0", "name": "unsteered (runs/a)"}
    assert [(side["name"], side["chosen"]) for side in said["sides"]] == [
        ("latent 957 at 8", True),
        ("unsteered (runs/b)", False),
    ]
    outputs = said["outputs"]
    assert (outputs["0"]["p7"]["tokens"], outputs["1"]["p7"]["tokens"], outputs["2"]["p7"]["tokens"]) == (7, 107, 207)
    assert outputs["2"]["p7"]["text"] == "runs/b unsteered p7"
    both = outputs["2"]["p7"]
    assert (both["judge"], both["label"]) == (RULES, "complied")
    assert both["others"] == [{"label": "degenerate", "judge": MODEL, "evidence": HOSTILE[2], "harmful": "yes"}]
    assert "others" not in outputs["0"]["p7"]
    lone = outputs["2"]["constructor"]
    assert (lone["label"], lone["judge"], lone["evidence"]) == ("unscored", RULES, "no verdict was recorded")
    assert len(said["prompts"]) == 31
    assert said["prompts"][7]["harmful"] is True
    assert said["prompts"][25]["about"] == ["p25", "harmful", "xstest", "fraud", "base64"]
    assert {name: [value for value, _ in some] for name, some in said["facets"].items()}["wrapper"] == [
        "base64",
        "none",
    ]
    assert "1 completions belong to prompts or specs outside" in Reader(page).words
    assert "the label of every judge (rules/2, wildguard@tiny)" in Reader(page).words
    _, other = blocks_of(render(three_sides(), talks(), provenance(), [], MODEL))
    assert other["outputs"]["2"]["p7"]["label"] == "degenerate"
    assert other["outputs"]["0"]["p7"]["label"] == "unscored", "who did not judge a side has no label there"


def test_empty_cases_have_a_page_and_no_nan() -> None:
    hole = comparison(contrasts=(nothing(),))
    bare = provenance(commit="", dirty=False, config={}, versions={}, hardware={}, artefacts={}, command="")
    for comparisons in ([], [comparison(contrasts=())], [hole]):
        for some in ([], talks()[:1], [Talk(BASE, [], [], []), Talk(STEERED, [], [], [])]):
            page = render(comparisons, some, bare, [], "")
            assert blocks_of(page)[0] == {}
            assert "nan" not in Reader(page).words.lower().replace("provenance", "")
        as_latex(comparisons).encode()
        assert printed(as_table(comparisons, 80), 80)
        assert as_markdown(comparisons)
    assert forest(hole) is None


def test_the_forest_has_every_share_and_its_interval() -> None:
    figure = forest(comparison())
    assert figure is not None
    data = {trace.marker.symbol: trace for trace in figure.data}
    assert list(data["circle"].x) == pytest.approx([60.8])
    assert list(data["circle"].error_x.array) == pytest.approx([6.0])
    assert list(data["diamond"].y) == [-1]
    assert list(data["circle-open"].y) == [-2], "a metric that is no share has no place on an axis of points"
    assert (list(data["line-ns-open"].x), list(data["line-ns-open"].y)) == ([-2.0], [-3])
    assert [note.text[0] for note in figure.layout.annotations] == ["↑", "↓", "↓", "↑"]


@pytest.mark.skipif(
    not CHROMIUM.exists() or not importlib.util.find_spec("playwright"), reason="no chromium and playwright"
)
def test_in_a_browser(tmp_path: Path, page: str) -> None:
    from playwright.sync_api import sync_playwright

    file = tmp_path / "compare.html"
    file.write_text(page, encoding="utf-8")
    asked, said = [], []

    def count() -> int:
        return int(tab.inner_text("#count").split()[0])

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        for width in (1280, 360):
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark")
            tab.on("request", lambda request: asked.append(request.url))
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("dialog", lambda dialog: said.append(dialog.message))
            tab.goto(file.as_uri())
            tab.wait_for_selector("#forest-1 .main-svg")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert "↑ harmbench, harmful refused" in tab.inner_text("#forest-0")
            assert "</script><img" in tab.inner_text("#forest-0")
            assert count() == 31
            tab.select_option("[name=judges]", "differ")
            assert count() == 0, "the chosen side and the base have one judge"
            tab.select_option("[name=spec]", "2")
            assert count() == 6, "of ten, four have one judge who says nothing"
            tab.select_option("[name=judges]", "")
            tab.fill("[name=search]", "runs/b unsteered p7")
            chips = tab.locator("#cards .side:nth-child(2) .chip")
            assert chips.all_inner_texts() == ["rules/2: complied", "wildguard@tiny: degenerate, harmful"]
            chips.nth(1).focus()
            assert "wildguard@tiny: <!--" in tab.locator(".tip:visible").inner_text()
            tab.fill("[name=search]", "")
            tab.select_option("[name=spec]", "1")
            tab.select_option("[name=wrapper]", "base64")
            assert count() == 9
            tab.select_option("[name=set]", "harmful")
            tab.select_option("[name=suite]", "demur/harmful")
            assert count() == 0
            for name in ("wrapper", "suite", "set"):
                tab.select_option(f"[name={name}]", "")
            # rules: label i on the base, i + 1 on the steered side
            tab.select_option("[name=before]", "refused")
            assert count() == 6
            tab.select_option("[name=after]", "partial")
            assert count() == 6
            tab.select_option("[name=change]", "lost")
            assert count() == 3, "partly refused: still refused for a benign prompt, not for a harmful one"
            assert tab.locator("#cards > li").count() == 3
            for name in ("before", "after"):
                tab.select_option(f"[name={name}]", "")
            tab.select_option("[name=change]", "newly")
            assert count() == 0
            tab.close()
        browser.close()
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [file.as_uri()] * 2
    assert said == []
