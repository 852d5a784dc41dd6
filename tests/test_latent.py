"""`demur latent`: cards against slow, obvious counts; pages that hostile text cannot leave; the verb end to end."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_endpoint import Request, endpoint, saying
from test_report import CHROMIUM, Reader
from tiny_study import write_tiny_study

from demur.cli.main import main
from demur.data.prompts import load_prompts, take
from demur.errors import InputError
from demur.features.card import CONTEXT, Activations, Curve, Text, activations, cards, decode, neighbours, pieces
from demur.features.describe import LONGEST, describe, one_line, question
from demur.features.openings import Openings
from demur.lm.harvest import norm_limits
from demur.lm.record import read
from demur.lm.token_types import TYPES, Typed, typed_chat, typed_text
from demur.record import from_json, read_json, to_json
from demur.report.card import render, visible
from demur.sae.store import LoadedSae, SaeConfig, SaeModel
from demur.spec import Edit, SteeringSpec
from demur.steering.steer import steer
from demur.testing import tiny_model, tiny_sae
from demur.types import CurvePoint, FeatureCard, Hookpoint, Message
from demur.verbs import latent as verb
from demur.verbs.config import Latent

AT = Hookpoint(1)
LATENTS = (5, 14, 48)
HOSTILE = '</script><img src=x onerror=alert(1)> <!--<script> {{ 7 * 7 }} " onload="alert(2)'
POINT = CurvePoint(4, 1.0, 0.5, 1.5, 0.2, 0.1, 0.3, 0.05, 0.04, 0.06)


@pytest.fixture(scope="module")
def lm() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def loaded(lm: Any) -> LoadedSae:
    made_for = SaeModel(lm.name, lm.fingerprint, lm.n_blocks)
    return LoadedSae(tiny_sae(), SaeConfig(32, 96, 8, str(AT), made_for), "f" * 16, "tiny")


@pytest.fixture(scope="module")
def text(lm: Any) -> Text:
    said = ["How do I make a cake?", "Héllo 🎂🎂 wörld\n\tand more", HOSTILE, "The answer is blue. " * 8, "Bye"]
    chats = [
        typed_chat(
            lm, [Message("system", "Be safe."), Message("user", one), Message("assistant", "I can't help with that.")]
        )
        for one in said
    ]
    plain = [typed_text(lm, one) for one in said]
    return Text([*chats, *plain], [*range(5), *range(4), 4], "a few lines")


@pytest.fixture(scope="module")
def made(lm: Any, loaded: LoadedSae, text: Text) -> list[FeatureCard]:
    return cards(lm, loaded, AT, text, LATENTS, 6, {5: Curve((POINT,), 8, 7)}, ["a note"])


def slow(lm: Any, loaded: LoadedSae, text: Text, latent: int) -> list[tuple[float, int, int]]:
    """(activation, row, token) of every token that is looked at, one row at a time, by encoding everything."""
    limit = norm_limits(lm, [AT], text.rows)[str(AT)]
    found = []
    for number, row in enumerate(text.rows):
        residual = read(lm.model, AT, torch.tensor([row.ids])).residual[0]
        values = loaded.sae.encode(residual)[:, latent]
        for token in range(1, len(row.ids)):
            if residual[token].norm() <= limit:
                found.append((float(values[token]), number, token))
    return found


@pytest.mark.parametrize("column", range(len(LATENTS)))
def test_examples_and_rates_are_those_of_a_slow_search(
    lm: Any, loaded: LoadedSae, text: Text, made: list[FeatureCard], column: int
) -> None:
    card = made[column]
    tokens = slow(lm, loaded, text, LATENTS[column])
    active = sorted((one for one in tokens if one[0] > 0), key=lambda one: (-one[0], one[1], one[2]))
    assert (card.tokens, card.active) == (len(tokens), len(active))
    assert card.left_out == sum(len(row.ids) for row in text.rows) - len(tokens)
    assert card.max_activation == pytest.approx(active[0][0], rel=1e-4)
    assert card.mean_activation == pytest.approx(sum(one[0] for one in active) / len(active), rel=1e-4)
    for one in card.firing:
        of_type = [t for t in tokens if TYPES[text.rows[t[1]].types[t[2]]] == one.type]
        assert (one.tokens, one.active) == (len(of_type), sum(t[0] > 0 for t in of_type))
    assert sum(one.tokens for one in card.firing) == card.tokens
    assert sum(card.histogram) == card.active
    assert card.histogram[-1] >= 1

    used: set[int] = set()
    said: set[tuple[int, ...]] = set()
    expected = []
    for value, row, token in active:
        before = tuple(text.rows[row].ids[max(0, token - CONTEXT) : token + 1])
        if text.documents[row] not in used and before not in said and len(expected) < 6:
            expected.append((value, row, token))
            used.add(text.documents[row])
            said.add(before)
    assert len(card.examples) == len(expected)
    for shown, (value, row, token) in zip(card.examples, expected, strict=True):
        assert shown.document == text.documents[row]
        assert shown.activations[shown.peak] == pytest.approx(value, rel=1e-4)
        assert shown.type == TYPES[text.rows[row].types[token]]
        assert shown.peak == min(token, CONTEXT)
        assert len(shown.tokens) == len(shown.activations) <= 2 * CONTEXT + 1
    assert card.examples[0].quantile == 1
    assert [one.quantile for one in card.examples] == sorted((one.quantile for one in card.examples), reverse=True)
    assert all(0 < one.quantile < 1 for one in card.middle[1:])


def test_activations_are_what_the_sae_encodes_in_any_batch(lm: Any, loaded: LoadedSae, text: Text) -> None:
    together: Activations = activations(lm, loaded.sae, AT, text.rows, LATENTS)
    one_by_one = [activations(lm, loaded.sae, AT, text.rows, [latent]) for latent in LATENTS]
    assert torch.allclose(together.values, torch.cat([one.values for one in one_by_one], 1), atol=1e-5)
    assert together.values[~together.kept].abs().sum() == 0
    starts = torch.tensor([0, *(len(row.ids) for row in text.rows)]).cumsum(0)[:-1]
    assert not together.kept[starts].any()


def test_massive_tokens_are_left_out(lm: Any, loaded: LoadedSae, text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demur.lm.harvest.MASSIVE", 1.05)
    (card,) = cards(lm, loaded, AT, text, [14])
    tokens = slow(lm, loaded, text, 14)
    assert card.tokens == len(tokens) < 450
    assert card.active == sum(one[0] > 0 for one in tokens)


def test_pieces_of_any_window_are_its_text(lm: Any, text: Text) -> None:
    for row in text.rows:
        for start, end in ((0, len(row.ids)), (3, 12), (5, len(row.ids))):
            ids = row.ids[start:end]
            found = pieces(lambda some: decode(lm, some), ids)
            assert len(found) == len(ids)
            assert "".join(found) == decode(lm, ids)
    cake = lm.tokenizer("🎂🎂", add_special_tokens=False).input_ids
    assert len(cake) == 8
    assert pieces(lambda some: decode(lm, some), cake) == ["", "", "", "🎂"] * 2
    assert "".join(pieces(lambda some: decode(lm, some), cake[2:7])) == decode(lm, cake[2:7])


def test_no_example_shows_half_a_character(lm: Any, loaded: LoadedSae) -> None:
    row = typed_text(lm, "🎂 é wörld " * 12)
    for card in cards(lm, loaded, AT, Text([row], [0], "cakes"), range(24), 1):
        for example in (*card.examples, *card.middle):
            assert "\ufffd" not in "".join(example.tokens)
            assert "".join(example.tokens) in decode(lm, row.ids)


def test_neighbours_are_those_of_plain_cosines(loaded: LoadedSae) -> None:
    rows, columns = loaded.sae.W_dec.tolist(), loaded.sae.W_enc.T.tolist()

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return float(dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5)

    expected = sorted((i for i in range(96) if i != 17), key=lambda i: -cosine(rows[i], rows[17]))[:10]
    found = neighbours(loaded.sae, 17)
    assert [one.latent for one in found] == expected
    for one in found:
        assert one.decoder_cosine == pytest.approx(cosine(rows[one.latent], rows[17]), abs=1e-5)
        assert one.encoder_cosine == pytest.approx(cosine(columns[one.latent], columns[17]), abs=1e-5)


def test_promoted_tokens_are_the_logit_lens_of_the_decoder_row(
    lm: Any, loaded: LoadedSae, made: list[FeatureCard]
) -> None:
    row = loaded.sae.W_dec[LATENTS[1]]
    logits = lm.model.lm_head(lm.model.model.norm(row)).detach()
    centred = logits - logits.mean()
    card = made[1]
    assert [one.id for one in card.promoted] == centred.argsort(descending=True)[:15].tolist()
    assert [one.id for one in card.suppressed] == centred.argsort()[:15].tolist()
    for one in (*card.promoted, *card.suppressed):
        assert one.logit == pytest.approx(float(centred[one.id]), abs=1e-4)
        assert one.token
        assert "\ufffd" not in one.token


def test_a_card_round_trips_and_a_silent_latent_has_one(lm: Any, loaded: LoadedSae, made: list[FeatureCard]) -> None:
    assert from_json(FeatureCard, json.loads(json.dumps(to_json(made[0])))) == made[0]
    silent = tiny_sae()
    silent.b_enc[3] = -1e4
    rows = [typed_text(lm, "Hello there. How do I make a cake?")]
    (card,) = cards(lm, replace(loaded, sae=silent), AT, Text(rows, [0], "a line"), [3])
    assert (card.active, card.max_activation, card.mean_activation, card.examples) == (0, 0, 0, ())
    assert sum(card.histogram) == 0
    assert "active on no token" in card.notes[0]
    assert "active on no token of the text" in Reader(render(card)).words


def test_text_of_which_nothing_can_be_looked_at_is_refused(lm: Any, loaded: LoadedSae) -> None:
    with pytest.raises(InputError, match="no token of the text"):
        activations(lm, loaded.sae, AT, [Typed([5], [4])], [1])


def test_hostile_text_stays_text_and_no_url_leaves_the_page(lm: Any, loaded: LoadedSae) -> None:
    said = "</script><img onerror=x>"
    (card,) = cards(lm, loaded, AT, Text([typed_text(lm, said)], [0], HOSTILE), [48], notes=[HOSTILE])
    assert said in "".join(card.examples[0].tokens)
    bad = replace(card.promoted[0], token=HOSTILE)
    reader = Reader(render(replace(card, description=HOSTILE, description_model=HOSTILE, promoted=(bad,))))
    assert [tag for tag, _ in reader.blocks] == ["style", "style", "script", "script", "script"]
    assert not {"img", "svg"} & {tag for tag, _, _ in reader.attributes}
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert "".join(map(visible, card.examples[0].tokens)) in reader.text
    assert reader.text.count(HOSTILE) == 5
    for _, name, value in reader.attributes:
        if name in ("src", "href", "action", "srcset", "data", "poster", "background"):
            assert value.startswith(("#", "data:"))
        assert not value.startswith("http")
    policy = next(value for _, _, value in reader.attributes if value.startswith("default-src"))
    assert "default-src 'none'" in policy
    assert "http" not in policy
    for tag, code in reader.blocks:
        if tag == "style":
            assert "url(" not in code
            assert "@import" not in code


def test_the_page_shows_every_number_of_the_card(made: list[FeatureCard]) -> None:
    text = Reader(render(made[0])).words
    assert "1.00 [0.50, 1.50]" in text
    assert "0.050 [0.040, 0.060]" in text
    assert "8 harmful and 7 plain benign prompts" in text
    assert "a note" in text
    for one in made[0].neighbours:
        assert f"{one.latent} {one.decoder_cosine:.3f} {one.encoder_cosine:.3f}" in text
    for one in made[0].firing:
        assert f"{one.active} {one.tokens}" in text
    page = render(made[0])
    for example in made[0].examples:
        share = example.activations[example.peak] / made[0].max_activation
        assert f'<b><span style="--a: {share:.3f}"' in page
    assert "machine-written" not in text
    assert "Not measured" in Reader(render(made[1])).words
    assert (visible("a\n"), visible("  "), visible(" a"), visible("")) == ("a↵", "␣␣", " a", "◌")


@pytest.mark.skipif(
    not CHROMIUM.exists() or not importlib.util.find_spec("playwright"), reason="no chromium and playwright"
)
def test_in_a_browser(tmp_path: Path, made: list[FeatureCard]) -> None:
    from playwright.sync_api import sync_playwright

    file = tmp_path / "card.html"
    file.write_text(render(replace(made[0], description=HOSTILE, description_model="m")), encoding="utf-8")
    asked, said = [], []
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        for width in (1280, 360):
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
            tab.on("request", lambda request: asked.append(request.url))
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("dialog", lambda dialog: said.append(dialog.message))
            tab.goto(file.as_uri())
            tab.wait_for_selector("#histogram .main-svg")
            assert tab.locator(".plot .main-svg").count() >= 3
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            shades = tab.locator(".passages span").evaluate_all(
                "all => all.map(one => getComputedStyle(one).backgroundColor)"
            )
            assert len(set(shades)) > 1
            tab.click("#theme")
            assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
            tab.close()
        browser.close()
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [file.as_uri()] * 2
    assert said == []


def test_a_description_is_one_line_from_the_endpoint_and_marked(made: list[FeatureCard]) -> None:
    asked: list[Request] = []
    said = saying('<think>hm\n</think>\n "Cakes \x1b[31m& \u202e blue"\nmore')
    with endpoint(lambda _: (200, said), asked) as url:
        line = describe(made[0], url + "/", "some-model", "secret")
    assert line == "Cakes [31m& blue"
    ((path, headers, body),) = asked
    assert (path, headers["authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert body == {"model": "some-model", "messages": [{"role": "user", "content": question(made[0])}]}
    assert "<<" in question(made[0])
    reader = Reader(render(replace(made[0], description=line, description_model="some-model")))
    assert f"{line} machine-written by some-model" in reader.words
    assert len(one_line("x" * 500)) == LONGEST


@pytest.mark.parametrize("said", [None, " \n", "<think>hm</think>"])
def test_a_description_without_words_is_a_sentence(made: list[FeatureCard], said: str | None) -> None:
    with (
        endpoint(lambda _: (200, saying(said)), []) as url,
        pytest.raises(InputError, match="without a text"),
    ):
        describe(made[0], url, "m", "secret")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"latent": ()}, "none"),
        ({"latent": (1, 1)}, "1, 1"),
        ({"latent": (-1,)}, "-1"),
        ({"latent": (1,), "examples": 0}, "examples is 0"),
        ({"latent": (1,), "endpoint": "http://x"}, "both"),
        ({"latent": (1,), "endpoint": "ftp://x", "endpoint_model": "m"}, "endpoint is"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Latent(**fields)


def test_the_curve_is_what_steering_changes(lm: Any, loaded: LoadedSae, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "_HARMFUL", 4)
    monkeypatch.setattr(verb, "_PLAIN", 3)
    monkeypatch.setattr(verb, "_MEASURED", 2)
    monkeypatch.setattr(verb, "_ANSWER_TOKENS", 4)
    with pytest.raises(InputError, match="refuses 0 of 4 harmful prompts"):
        verb.curve(lm, loaded, AT, [5], "Be safe.")
    monkeypatch.setattr(verb, "find_openings", lambda refusals, others: Openings(((30,),), (1,), 1))
    found = verb.curve(lm, loaded, AT, [5, 14], "Be safe.")
    harmful = verb._answers(lm, take(load_prompts("harmful", "harmful"), "select", 4), "Be safe.")[::2]
    plain = verb._answers(lm, take(load_prompts("plain", "benign"), "select", 3), "Be safe.")[:2]

    def log_probs(row: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return lm.model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)

    def log_odds(rows: list[list[int]]) -> float:
        return sum(float(torch.logit(log_probs(row)[-1, 30].exp())) for row in rows) / len(rows)

    def answered(one: Any) -> torch.Tensor:
        return log_probs([*one.row, *one.answer.ids[:-1]])[-len(one.answer.ids) :]

    rows = [one.row for one in harmful]
    benign = [one.row for one in plain]
    for latent in (5, 14):
        curve = found[latent]
        assert (curve.harmful, curve.benign) == (2, 2)
        assert [point.value for point in curve.points] == [0, 2, 4, 6, 8, 10, 12]
        for point in (curve.points[0], curve.points[4]):
            before = log_odds(rows), log_odds(benign), [answered(one) for one in plain]
            with steer(lm, SteeringSpec((Edit(str(AT), loaded.hash, (latent,), point.value),)), [loaded]):
                after = log_odds(rows), log_odds(benign), [answered(one) for one in plain]
            kl = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(before[2], after[2], strict=True)]
            assert point.harmful == pytest.approx(after[0] - before[0], abs=1e-3)
            assert point.benign == pytest.approx(after[1] - before[1], abs=1e-3)
            assert point.kl == pytest.approx(sum(kl) / len(kl), abs=1e-3)
            assert point.harmful_low <= point.harmful <= point.harmful_high
    monkeypatch.setattr(verb, "_ANSWER_TOKENS", 0)
    with pytest.raises(InputError, match="nothing to measure KL on"):
        verb.curve(lm, loaded, AT, [5], "Be safe.")


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_study(tmp_path)
    monkeypatch.setattr(verb, "_ANSWER_TOKENS", 3)
    monkeypatch.setattr("demur.verbs.sae_eval._ANSWER_TOKENS", 2)
    monkeypatch.setattr(verb, "_PROMPTS", 1)
    monkeypatch.setenv("OPENAI_API_KEY", "a-private-key")
    command = ["latent", "5", "17", "--sae", str(tmp_path / "sae"), "--model", str(tmp_path / "model")]
    command += ["--out", str(tmp_path / "cards"), "--json"]
    asked: list[Request] = []
    with endpoint(lambda _: (200, saying("About cakes.")), asked) as url:
        assert main([*command, "--endpoint", url, "--endpoint-model", "some-model"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)["cards"]
    assert [card["latent"] for card in found] == [5, 17]
    assert "described by some-model (machine-written): About cakes." in shown.err
    assert [one.headers["authorization"] for one in asked] == ["Bearer a-private-key"] * 2
    for card in found:
        assert read_json(tmp_path / "cards" / f"latent-{card['latent']}.json") == card
        assert "a-private-key" not in (tmp_path / "cards" / f"latent-{card['latent']}.html").read_text().replace(
            "secretly", ""
        )
        assert "What clamping does was not measured" in card["notes"][0]


def test_files_of_text_and_an_endpoint_that_fails_keep_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_study(tmp_path)
    monkeypatch.setattr(verb, "curve", lambda *_: {5: Curve((POINT,), 8, 7)})
    lines = [{"text": f"Hello there, number {i}. {HOSTILE}"} for i in range(6)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["latent", "5", "--sae", str(tmp_path / "sae"), "--model", str(tmp_path / "model"), "--context", "24"]
    command += ["--data", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "cards"), "--json"]
    assert main([*command, "--endpoint", "http://127.0.0.1:9", "--endpoint-model", "m"]) == 1
    assert json.loads(capsys.readouterr().out)["kind"] == "NotFoundError"
    card = from_json(FeatureCard, read_json(tmp_path / "cards" / "latent-5.json"))
    assert card.documents == 6
    assert card.text == "text.jsonl"
    assert len({one.document for one in card.examples}) == len(card.examples)
    assert main(command) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["latent"] == 5
    assert "clamped to 4: refusal log-odds +1.00 on harmful prompts" in shown.err
    assert main([*command, "--max-tokens", "3"]) == 1


def test_a_latent_that_the_sae_has_not_is_one_sentence_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_study(tmp_path)
    capsys.readouterr()
    assert main(["latent", "96", "--sae", str(tmp_path / "sae"), "--model", "no/such/model"]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("demur: latent is 96")
    assert "\n" not in said
