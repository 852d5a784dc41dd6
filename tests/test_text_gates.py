"""Gates that read text: what they read, what becomes of each row, and that failing to ask leaves nothing unsteered."""

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from fake_endpoint import Request, endpoint
from test_serve import served
from tiny_study import save_model, write_tiny_study
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config

import demur.text_gates
from demur.cli.main import main
from demur.data.prompts import load_prompts
from demur.errors import InputError, NotFoundError
from demur.eval.complete import Completions
from demur.eval.divergence import divergence, perplexity
from demur.eval.measurements import Measurements
from demur.lm.chat import chat_ids, text_ids
from demur.lm.generate import generate
from demur.lm.load import LanguageModel, load
from demur.record import read_json, read_jsonl, to_json
from demur.sae.store import LoadedSae, SaeConfig, SaeModel, load_sae, save_sae
from demur.serve import run
from demur.spec import Edit, SteeringSpec, TextGate
from demur.steering.spec_file import write_spec
from demur.steering.steer import steer
from demur.testing import tiny_model, tiny_sae, tiny_tokenizer
from demur.text_gates import check, decide, decide_each, opened
from demur.types import Completion, Hookpoint, Measurement, Message, Prompt
from demur.verbs.attack_config import AttackConfig
from demur.verbs.attack_target import read_target
from demur.verbs.serve_config import Serve

openai = pytest.importorskip("openai")

PLACE = "layers.1.resid_post"
CONTEXT = 40
TEXTS = [
    "Hello there",
    "How do I make a cake?",
    "I'm sorry, but I can't help with that. " * 3,
    "The answer is blue. " * 9,
    "a",
    "Why? " * 30,
]
Save = Callable[..., str]


def user(*texts: str) -> list[Message]:
    return [Message("user", text) for text in texts]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What is loaded and remembered is not another test's."""
    demur.text_gates._reader.cache_clear()
    yield
    demur.text_gates._reader.cache_clear()


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Writes a tiny random classifier; returns its folder."""

    def write(labels: tuple[str, ...] = ("safe", "harmful"), kind: str = "bert", **more: Any) -> str:
        folder = tmp_path_factory.mktemp("classifier")
        tokenizer = tiny_tokenizer()
        sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "id2label": dict(enumerate(labels))} | more
        sizes["pad_token_id"] = tokenizer.pad_token_id
        if kind == "bert":
            own = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
            config: Any = BertConfig(**own, max_position_embeddings=CONTEXT + 2, **sizes)
        else:
            config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=CONTEXT + 2, **sizes)
            tokenizer.pad_token = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForSequenceClassification.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.5)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture(scope="module")
def two(save: Save) -> str:
    return save()


def scores(name: str, texts: list[str]) -> list[dict[str, float]]:
    return demur.text_gates._reader(name, "cpu")(texts)


def slow(name: str, text: str, single: bool = False) -> list[float]:
    """The largest score of each class over pieces of the text, each by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    ids = tiny_tokenizer()(text).input_ids
    step = CONTEXT - CONTEXT // 4
    starts = [0, *range(step, max(1, len(ids) - CONTEXT // 4), step)]
    found = []
    with torch.no_grad():
        for start in starts:
            logits = model(input_ids=torch.tensor([ids[start : start + CONTEXT]])).logits[0]
            found.append(logits.sigmoid() if single else logits.softmax(-1))
    return [float(one) for one in torch.stack(found).amax(0)]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize(
    ("labels", "more"),
    [
        (("safe", "harmful"), {}),
        (("a", "b", "c"), {"problem_type": "multi_label_classification"}),
        (("harmful",), {}),
    ],
)
def test_scores_are_those_of_each_piece_alone(save: Save, kind: str, labels: tuple[str, ...], more: Any) -> None:
    name = save(labels, kind, **more)
    found = scores(name, TEXTS)
    assert len({len(tiny_tokenizer()(text).input_ids) > CONTEXT for text in TEXTS}) == 2
    for text, one in zip(TEXTS, found, strict=True):
        assert list(one) == list(labels)
        assert list(one.values()) == pytest.approx(slow(name, text, len(labels) != 2), abs=1e-5)
    assert len({round(one[labels[-1]], 4) for one in found}) == len(TEXTS)


def middle(name: str, *texts: str, label: str = "harmful") -> tuple[float, str, str]:
    """A threshold between the scores of the texts, one below it and one above it."""
    order = sorted(zip((one[label] for one in scores(name, list(texts))), texts, strict=True))
    assert order[0][0] < order[-1][0] - 1e-3
    return (order[0][0] + order[-1][0]) / 2, order[0][1], order[-1][1]


def test_any_message_of_the_user_opens_the_gate_for_good_and_nobody_else_does(two: str) -> None:
    threshold, low, high = middle(two, "Hello there", "How do I make a cake?")
    spec = SteeringSpec((Edit(PLACE, "s", (1,), 3.0),), gate=TextGate(two, threshold), system="Be kind.")
    shut, open_ = SteeringSpec(system="Be kind."), replace(spec, gate=None)
    plain = replace(spec, gate=None, system="")
    talks = [
        user(low),
        user(high),
        [Message("system", high), *user(low), Message("assistant", high)],
        [*user(low), Message("assistant", low), *user(high)],
        [*user(high), Message("assistant", low), *user(low)],
        user(" "),
        [Message("system", high)],  # nothing else is there to be read
        user(high),
    ]
    wanted = [shut, open_, shut, open_, open_, shut, open_, plain]
    assert decide([*[spec] * 7, plain], talks) == wanted
    assert decide_each([spec, plain], talks[:2]) == {spec.hash: [shut, open_]}
    assert opened(spec) == open_
    assert opened(plain) == plain
    safe = replace(spec, gate=TextGate(two, 1 - threshold, "safe"))
    assert decide([spec, safe, spec, safe], [user(low)] * 2 + [user(high)] * 2) == [shut, open_, open_, shut]


def test_labels_are_names_or_numbers_and_otherwise_refused(save: Save, two: str) -> None:
    three = save(("ok", "rude", "harmful"))
    found = scores(three, ["Hello"])[0]

    def opens(name: str, label: str, threshold: float) -> bool:
        spec = SteeringSpec((Edit(PLACE, "s", (1,), 3.0),), gate=TextGate(name, threshold, label))
        return bool(decide([spec], [user("Hello")])[0].edits)

    for number, label in enumerate(found):
        for given in (label, str(number)):
            assert opens(three, given, found[label] - 1e-3)
            assert not opens(three, given, found[label] + 1e-3)
    second = scores(two, ["Hello"])[0]["harmful"]
    assert opens(two, "", second - 1e-3)
    assert not opens(two, "", second + 1e-3)
    with pytest.raises(InputError, match=r"names no label, but .* scores ok, rude, harmful; name one"):
        opens(three, "", 0.5)
    for wrong in ("Rude", "3", "-1"):
        with pytest.raises(InputError, match=rf"reads '{wrong}', but .* scores ok, rude, harmful"):
            opens(three, wrong, 0.5)


def test_what_is_no_classifier_is_refused_in_a_sentence(save: Save, two: str, tmp_path: Path) -> None:
    def asked(name: str) -> None:
        check([SteeringSpec((Edit(PLACE, "s", (1,), 3.0),), gate=TextGate(name))])

    save_model(tiny_model(), tmp_path / "chat")
    with pytest.raises(InputError, match=r"lacks 1 of its weights \(score\.weight"):
        asked(str(tmp_path / "chat"))
    for nothing in (str(tmp_path / "nowhere"), "nobody/has-this", str(tmp_path)):
        with pytest.raises(NotFoundError, match=r"classifier .* could not be loaded \(.+\); give the folder or hub id"):
            asked(nothing)
    with pytest.raises(InputError, match="is a regression"):
        asked(save(("x",), problem_type="regression"))
    for wrong, says in (
        ("moderation:http://x/v1", "expected moderation:URL#MODEL"),
        ("moderation:x#m", "endpoint is 'x'"),
    ):
        with pytest.raises(InputError, match=says):
            asked(wrong)
    broken = AutoModelForSequenceClassification.from_pretrained(two)
    with torch.no_grad():
        broken.classifier.bias.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(InputError, match="gives no number"):
        asked(str(tmp_path / "broken"))
    check([SteeringSpec((Edit(PLACE, "s", (1,), 3.0),), gate=TextGate(two))])


def moderated(**of: dict[str, float]) -> Callable[[Request], tuple[int, bytes]]:
    """An endpoint that scores texts by their first word; others 0."""

    def answer(request: Request) -> tuple[int, bytes]:
        assert request.path == "/v1/moderations"
        found = of.get(request.body["input"].split()[0], {"violence": 0.0, "self-harm/intent": 0.0, "unused": None})
        return 200, json.dumps({"results": [{"flagged": False, "category_scores": found}]}).encode()

    return answer


BAD = {"violence": 0.2, "self-harm/intent": 0.8}


def test_a_moderation_endpoint_is_asked_once_about_each_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not for an address in a file")
    monkeypatch.setenv(demur.text_gates.KEY, "mine")
    asked: list[Request] = []
    edit = Edit(PLACE, "s", (1,), 3.0)
    with endpoint(moderated(bad=BAD), asked) as url:
        name = f"moderation:{url}#guard"
        gates = [TextGate(name), TextGate(name, 0.5, "violence"), TextGate(name, 0.1, "violence")]
        specs = [SteeringSpec((edit,), gate=gate) for gate in gates]
        for text, wanted in (("bad thing", [True, False, True]), ("good thing", [False] * 3)):
            talk = [*user("first"), Message("assistant", "bad"), *user(text)]
            assert [bool(one.edits) for one in decide(specs, [talk] * 3)] == wanted
        with pytest.raises(InputError, match=r"reads 'hate', but moderation:.* scores violence, self-harm/intent;"):
            decide([replace(specs[0], gate=TextGate(name, 0.5, "hate"))], [user("bad thing")])
    assert sorted(one.body["input"] for one in asked) == ["bad thing", "first", "good thing"]
    assert {one.body["model"] for one in asked} == {"guard"}
    assert {one.headers["authorization"] for one in asked} == {"Bearer mine"}
    with pytest.raises(NotFoundError, match=r"/v1/moderations does not answer"):
        decide(specs[:1], [user("new")])
    monkeypatch.setenv(demur.text_gates.KEY, "schlüssel")
    demur.text_gates._reader.cache_clear()
    with pytest.raises(InputError, match="DEMUR_MODERATION_KEY holds characters"):
        decide(specs[:1], [user("new")])


@pytest.mark.parametrize(
    ("status", "reply", "says"),
    [
        (500, b"out of order", r"answers 500 to 'guard': out of order"),
        (400, b'{"error": "maximum context length"}', "answers 400 to 'guard'"),
        (200, b"{}", "without category_scores"),
        (200, b'{"results": [{"category_scores": {}}]}', "without category_scores"),
        (200, b'{"results": [{"category_scores": {"x": "high"}}]}', "without category_scores"),
        (200, b'{"results": [{"category_scores": {"x": NaN}}]}', "gives no number"),
        (200, b"<html>", "without category_scores"),
    ],
)
def test_an_endpoint_that_gives_no_scores_opens_and_shuts_nothing(status: int, reply: bytes, says: str) -> None:
    with endpoint(lambda request: (status, reply), []) as url:
        spec = SteeringSpec((Edit(PLACE, "s", (1,), 3.0),), gate=TextGate(f"moderation:{url}#guard"))
        with pytest.raises(InputError, match=says):
            decide([spec], [user("Hello")])


class Tiny:
    """A model, an SAE, a gated spec, and a prompt on either side of its gate."""

    def __init__(self, root: Path, classifier: str) -> None:
        save_model(tiny_model(seed=2), root / "model")
        self.lm: LanguageModel = load(str(root / "model"))
        about = SaeModel(self.lm.name, self.lm.fingerprint, self.lm.n_blocks)
        save_sae(root / "sae", tiny_sae(), SaeConfig(32, 96, 8, PLACE, about))
        self.sae: LoadedSae = load_sae(root / "sae")
        self.threshold, self.low, self.high = middle(classifier, "Hello there", "How do I make a cake?")
        edit = Edit(PLACE, self.sae.hash, (5,), 20.0)
        self.spec = SteeringSpec((edit,), gate=TextGate(classifier, self.threshold), system="Be kind.")
        write_spec(root / "gated.json", self.spec)
        self.options = ["--model", str(root / "model"), "--sae", str(root / "sae"), "--spec", str(root / "gated.json")]

    def says(self, text: str, steered: bool, n: int = 8) -> str:
        """The oracle: alone, without any gate."""
        talk = [Message("system", "Be kind."), *user(text)]
        with steer(self.lm, opened(self.spec) if steered else SteeringSpec(), [self.sae]):
            return generate(self.lm, [chat_ids(self.lm, talk)], n)[0].text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, two: str) -> Tiny:
    found = Tiny(tmp_path_factory.mktemp("tiny"), two)
    assert found.says(found.high, True) != found.says(found.high, False)
    assert found.says(found.low, True) != found.says(found.low, False)
    return found


def test_completions_are_those_of_open_and_shut_rows_and_labelled_by_the_gated_spec(tiny: Tiny, tmp_path: Path) -> None:
    texts = [tiny.low, tiny.high, tiny.low + "!" * 3, tiny.high + " "]
    prompts = [Prompt(str(i), (Message("user", text),), "harmful", "x") for i, text in enumerate(texts)]
    wide = [bool(one.edits) for one in decide([tiny.spec] * 4, [p.messages for p in prompts])]
    path = tmp_path / "completions.jsonl"
    Completions(path).complete(tiny.lm, prompts, tiny.spec, [tiny.sae], "", 8, 4)
    found = read_jsonl(Completion, path)
    assert {one.spec for one in found} == {tiny.spec.hash}
    by_prompt = {one.prompt: one.text for one in found}
    assert [by_prompt[p.id] for p in prompts] == [tiny.says(text, on) for text, on in zip(texts, wide, strict=True)]
    each = Completions(tmp_path / "each.jsonl").complete(
        tiny.lm, prompts[:3], [tiny.spec, opened(tiny.spec), SteeringSpec(system="Be kind.")], [tiny.sae], "", 8, 4
    )
    assert [one.spec for one in each] == [tiny.spec.hash, opened(tiny.spec).hash, SteeringSpec(system="Be kind.").hash]
    assert each[1].text == tiny.says(tiny.high, True)


def test_damage_is_done_to_the_rows_whose_gate_opens(tiny: Tiny, tmp_path: Path) -> None:
    spec = replace(tiny.spec, system="")
    texts = [tiny.low, tiny.high, tiny.low]
    answers = [text_ids(tiny.lm, " The answer is blue") for _ in texts]
    rows = [chat_ids(tiny.lm, user(text)) for text in texts]
    items = [(str(i), row, answer) for i, (row, answer) in enumerate(zip(rows, answers, strict=True))]
    gates = decide_each([spec], [user(text) for text in texts])
    found = Measurements(tmp_path / "m.jsonl")
    always = opened(spec)
    divergence(tiny.lm, Hookpoint(1), items, [spec, always], [tiny.sae], found, 8, decided=gates)
    perplexity(
        tiny.lm,
        Hookpoint(1),
        [item[:2] for item in items],
        [spec, always, SteeringSpec()],
        [tiny.sae],
        found,
        8,
        decided=gates,
    )
    kl, whole = (found.values("kl", one.hash, ["0", "1", "2"]) for one in (spec, always))
    assert kl == pytest.approx([0, whole[1], 0], abs=1e-6)
    assert min(whole) > 1e-3
    gated, on, off = (found.values("nll", one.hash, ["0", "1", "2"]) for one in (spec, always, SteeringSpec()))
    assert gated == pytest.approx([off[0], on[1], off[2]], abs=1e-5)
    assert abs(on[0] - off[0]) > 1e-4


def test_generate_and_chat(tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*tiny.options, "--max-new-tokens", "8"]
    assert main(["generate", tiny.low, tiny.high, *options, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("the gate stayed shut") == 1
    shut, open_ = json.loads(shown.out)["answers"]
    assert shut["spec"] == open_["spec"] == tiny.spec.hash
    assert shut["text"] == tiny.says(tiny.low, False)
    assert open_["text"] == tiny.says(tiny.high, True)
    assert not shut["applied"]
    assert open_["applied"][0]["changed"] > 0
    lines = iter([tiny.low, "/reset", tiny.high])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, "/quit"))
    assert main(["chat", *options]) == 0
    assert capsys.readouterr().out == f"{tiny.says(tiny.low, False)}\n{tiny.says(tiny.high, True)}\n"


def test_an_attack_meets_the_gate_again_in_every_turn(tiny: Tiny) -> None:
    config = AttackConfig(
        model=tiny.options[1], sae=(tiny.options[3],), spec=(Path(tiny.options[5]),), max_new_tokens=8
    )
    attacked = read_target(config)()
    assert attacked.sides[1][1] == tiny.spec.hash
    reply = attacked.target([(tiny.spec.hash, tuple(user(text))) for text in (tiny.low, tiny.high)])
    assert [one.text for one in reply if one] == [tiny.says(tiny.low, False), tiny.says(tiny.high, True)]


def test_eval_labels_answers_and_damage_by_the_gated_spec(two: str, tmp_path: Path) -> None:
    write_tiny_study(tmp_path)
    model, sae = str(tmp_path / "model"), load_sae(tmp_path / "sae")
    plain = [prompt for prompt in load_prompts("plain", "benign") if prompt.split == "test"]
    harm = {prompt.id: scores(two, [prompt.messages[-1].content])[0]["harmful"] for prompt in plain}
    threshold = statistics.median(harm.values()) + 1e-6
    spec = SteeringSpec((Edit(sae.config.hookpoint, sae.hash, (5,), 20.0),), gate=TextGate(two, threshold))
    write_spec(tmp_path / "gated.json", spec)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "A short text to read, for perplexity."}) + "\n")
    common = ["--model", model, "--sae", str(tmp_path / "sae"), "--spec", str(tmp_path / "gated.json")]
    common += ["--suite", "plain:5", "--max-new-tokens", "4", "--text", str(text), "--out", str(tmp_path / "run")]
    assert main(["eval", *common]) == 0
    said = read_jsonl(Completion, tmp_path / "run" / "completions.jsonl")
    assert {one.spec for one in said} == {"unsteered", spec.hash}
    measured = read_jsonl(Measurement, tmp_path / "run" / "measurements.jsonl")
    kl = {one.item: one.value for one in measured if (one.name, one.spec) == ("kl", spec.hash)}
    assert len(kl) > 20
    assert {item: value > 1e-6 for item, value in kl.items()} == {item: harm[item] > threshold for item in kl}
    assert 0 < sum(value > 1e-6 for value in kl.values()) < len(kl)
    assert read_json(tmp_path / "run" / "specs" / f"{spec.hash}.json")["gate"]["classifier"] == two


def test_verbs_that_cannot_decide_say_so(tiny: Tiny, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    for command, says in (
        (["verify", *tiny.options], "there is nothing of it to be verified here"),
        (["eval", *tiny.options, *out, "--task", "piqa:2", "--chat"], "leave the tasks out, or the gate"),
    ):
        assert main(command) == 1
        assert says in capsys.readouterr().err


def post(address: str, model: Any, text: str, **more: Any) -> Any:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        given = {"model": model, "temperature": 0, "max_completion_tokens": 8} | more
        return client.chat.completions.create(messages=[{"role": "user", "content": text}], **given)


def test_the_server_decides_for_each_request_and_answers_nothing_undecided(tiny: Tiny, tmp_path: Path) -> None:
    quick = threading.Event()
    quick.set()
    broken = False

    def answer(request: Request) -> tuple[int, bytes]:
        quick.wait(20)
        return (500, b"down") if broken else moderated(bad=BAD)(request)

    with endpoint(answer, []) as url:
        asks = replace(tiny.spec, gate=TextGate(f"moderation:{url}#guard"))
        write_spec(tmp_path / "gated.json", asks)
        write_spec(tmp_path / "local.json", tiny.spec)
        write_spec(tmp_path / "clamp.json", opened(tiny.spec))
        config = Serve(model=tiny.options[1], name="tiny", spec=(tmp_path,), sae=(tiny.options[3],), waiting=4)
        with served(config) as (server, address):

            def said(model: str, text: str, **more: Any) -> str:
                return str(post(address, model, text, **more).choices[0].message.content).strip()

            for text, on in (("bad thing", True), ("good thing", False)):
                assert said("gated", text) == tiny.says(text, on)
            for text, on in ((tiny.low, False), (tiny.high, True)):
                assert said("local", text) == tiny.says(text, on)
            found = {one["id"]: one["spec"] for one in json.loads(server_text(address, "/v1/models"))["data"]}
            assert found["gated"] == asks.hash
            counted = server_text(address, "/metrics")
            assert 'demur_gates_total{opened="yes",spec="gated"} 1.0' in counted
            assert 'demur_gates_total{opened="no",spec="gated"} 1.0' in counted
            # as plain text, by ids too
            plain = replace(asks, system="")
            with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
                inline = {"demur_spec": to_json(plain)}
                texts = [
                    client.completions.create(
                        model="tiny", prompt=prompt, temperature=0, max_tokens=6, extra_body=inline
                    ).choices
                    for prompt in (["bad thing", "good thing"], text_ids(tiny.lm, "bad thing", special=True))
                ]
                assert [one.text for one in texts[0]] == [
                    oracle(tiny, plain, "bad thing"),
                    oracle(tiny, None, "good thing"),
                ]
                assert texts[1][0].text == texts[0][0].text
            # a request may not make the server load or ask anything that its operator has not named
            others = (TextGate("somebody/model"), TextGate("moderation:http://169.254.0.1/v1#m"))
            for other in (*others, TextGate(f"moderation:{url}#guard", 0.5, "hate")):
                foreign = to_json(replace(plain, gate=other))
                with pytest.raises(openai.BadRequestError, match="may name only classifiers, with their labels"):
                    post(address, "tiny", "bad thing", extra_body={"demur_spec": foreign})
            # a slow classifier holds up nobody else
            quick.clear()
            late: list[str] = []
            threads = [threading.Thread(target=lambda i=i: late.append(said("gated", f"bad {i}"))) for i in range(12)]
            for thread in threads:
                thread.start()
            until = time.monotonic() + 15
            while server._undecided < 12 and time.monotonic() < until:
                time.sleep(0.01)
            assert said("clamp", "Hello") == tiny.says("Hello", True)
            assert not late
            with pytest.raises(openai.RateLimitError):
                said("gated", "bad and too many")
            quick.set()
            for thread in threads:
                thread.join(30)
            assert sorted(late) == sorted(tiny.says(f"bad {i}", True) for i in range(12))
            broken = True
            for stream in (False, True):
                with pytest.raises(
                    openai.InternalServerError, match="did not answer, so neither does the model"
                ) as error:
                    post(address, "gated", "something new", stream=stream)
                assert error.value.status_code == 503
                assert url not in str(error.value)
            assert said("gated", "bad thing") == tiny.says("bad thing", True)  # known already
            assert said("clamp", "something new") == tiny.says("something new", True)
        demur.text_gates._reader.cache_clear()
        with pytest.raises(InputError, match=r"the spec 'gated' does not fit: .*answers 500"):
            run.prepare(config)


def server_text(address: str, path: str) -> str:
    with urlopen(address + path) as found:
        return str(found.read().decode())


def oracle(tiny: Tiny, spec: SteeringSpec | None, text: str) -> str:
    with steer(tiny.lm, opened(spec) if spec else SteeringSpec(), [tiny.sae]):
        ids = generate(tiny.lm, [text_ids(tiny.lm, text, special=True)], 6)[0].ids
    return str(tiny.lm.tokenizer.decode(ids, skip_special_tokens=True))
