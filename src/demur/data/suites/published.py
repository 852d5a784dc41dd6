"""The suites themselves. To add one, add an entry here and run `python scripts/suites_table.py` for the docs.

Dataset ids, file names, columns and gating were looked up in the publishers' pages and in public code that reads the
sets. Counts are of the published files: ours where `tests/test_suites.py` checks them, others' elsewhere.
"""

from dataclasses import replace

from demur.data.suites.suite import Part, Suite

_OWN = Suite("harmful", "demur's harmful requests", "MIT", harmful=120)

_TRAINING = "to train on; its split is select throughout"
_TALKS = "to train on; 120 of them are the test split"

_HARMBENCH = Suite(
    name="harmbench",
    title="HarmBench, standard behaviours, test",
    licence="MIT",
    paper="2402.04249",
    homepage="https://github.com/centerforaisafety/HarmBench",
    parts=(Part(("harmbench_behaviors_text_test.csv",), intent="harmful"),),
    text=("Behavior",),
    context="ContextString",
    only={"FunctionalCategory": ("standard",)},
    identity="BehaviorID",
    category=("FunctionalCategory", "SemanticCategory"),
    harmful=159,
    note="without contextual and copyright behaviours",
)
_VALIDATION = Part(("harmbench_behaviors_text_val.csv",), intent="harmful", split="select")

_OR_BENCH = Suite(
    name="or-bench-hard-1k",
    title="OR-Bench hard",
    licence="CC-BY-4.0",
    paper="2405.20947",
    homepage="https://github.com/justincui03/or-bench",
    parts=(Part(("or-bench-hard-1k.csv",), "or-bench-hard-1k.csv", intent="benign"),),
    hub="bench-llm/or-bench",
    category=("category",),
)

_TUNED = Suite(
    name="stl-malicious",
    title="Safety-Tuned LLaMAs, I-MaliciousInstructions",
    licence="CC-BY-NC-4.0",
    paper="2309.07875",
    homepage="https://github.com/vinid/safety-tuned-llamas",
    parts=(Part(("I-MaliciousInstructions.json",), intent="harmful"),),
    text=("instructions",),
    category=("tags",),
    harmful=98,
)

_DIRECTION = Suite(
    name="refusal-direction-test",
    title="Splits of the refusal-direction paper, test",
    licence="Apache-2.0; harmless rows (Alpaca) CC-BY-NC-4.0",
    paper="2406.11717",
    homepage="https://github.com/andyrdt/refusal_direction",
    parts=(Part(("harmful_test.json",), intent="harmful"), Part(("harmless_test.json",), intent="benign")),
    text=("instruction",),
    category=("category",),
)


def _direction(part: str, harmful: int, benign: int) -> Suite:
    files = (
        Part((f"harmful_{part}.json",), intent="harmful", split="select"),
        Part((f"harmless_{part}.json",), intent="benign", split="select"),
    )
    title = f"Splits of the refusal-direction paper, {part}"
    return replace(
        _DIRECTION, name=f"refusal-direction-{part}", title=title, parts=files, harmful=harmful, benign=benign
    )


SUITES: tuple[Suite, ...] = (
    _OWN,
    replace(_OWN, name="lookalike", title="demur's look-alikes of them", harmful=None, benign=120),
    replace(_OWN, name="plain", title="demur's plain requests", harmful=None, benign=120),
    replace(_OWN, name="twins-harmful", title="demur's training set for gates: harmful", harmful=4211, note=_TRAINING),
    replace(
        _OWN,
        name="twins-lookalike",
        title="demur's training set for gates: a look-alike of each",
        harmful=None,
        benign=4211,
        note=_TRAINING,
    ),
    replace(
        _OWN,
        name="talks-harmful",
        title="demur's training set for gates: talks that end harmfully",
        harmful=1225,
        note=_TALKS,
    ),
    replace(
        _OWN,
        name="talks-lookalike",
        title="demur's training set for gates: talks like them that do not",
        harmful=None,
        benign=1225,
        note=_TALKS,
    ),
    replace(
        _OWN,
        name="everyday",
        title="demur's training set for gates: plain requests",
        harmful=None,
        benign=720,
        note=_TRAINING,
    ),
    Suite(
        name="xstest",
        title="XSTest v2",
        licence="CC-BY-4.0",
        paper="2308.01263",
        homepage="https://github.com/paul-rottger/exaggerated-safety",
        parts=(Part(("xstest_prompts.csv",), "xstest_prompts.csv"),),
        hub="Paul/XSTest",
        label="label",
        labels={"safe": "benign", "unsafe": "harmful"},
        identity="id",
        category=("type",),
        harmful=200,
        benign=250,
    ),
    Suite(
        name="wildguardtest",
        title="WildGuardTest",
        licence="ODC-BY",
        paper="2406.18495",
        homepage="https://github.com/allenai/wildguard",
        parts=(
            Part(
                ("wildguard_test.parquet", "wildguard_test.jsonl", "wildguard_test.csv"), "test/wildguard_test.parquet"
            ),
        ),
        hub="allenai/wildguardmix",
        gated=True,
        label="prompt_harm_label",
        labels={"harmful": "harmful", "unharmful": "benign"},
        category=("adversarial", "subcategory"),
        harmful=754,
        benign=945,
        note="the 26 prompts that its annotators did not agree on are left out",
    ),
    Suite(
        name="wildjailbreak",
        title="WildJailbreak, evaluation part",
        licence="ODC-BY",
        paper="2406.18510",
        homepage="https://github.com/allenai/wildteaming",
        parts=(Part(("eval/eval.tsv", "wildjailbreak/eval.tsv", "wildjailbreak_eval.tsv"), "eval/eval.tsv"),),
        hub="allenai/wildjailbreak",
        gated=True,
        text=("adversarial",),
        label="data_type",
        labels={"adversarial_harmful": "harmful", "adversarial_benign": "benign"},
        harmful=2000,
        benign=210,
        note="every prompt is a jailbreak attempt or looks like one",
    ),
    Suite(
        name="advbench",
        title="AdvBench harmful behaviours",
        licence="MIT",
        paper="2307.15043",
        homepage="https://github.com/llm-attacks/llm-attacks",
        parts=(Part(("advbench.csv", "harmful_behaviors.csv"), "data/train-00000-of-00001.parquet", intent="harmful"),),
        hub="walledai/AdvBench",
        gated=True,
        text=("goal", "prompt"),
        harmful=520,
    ),
    Suite(
        name="advbench-50",
        title="AdvBench, the 50 behaviours of PAIR",
        licence="MIT",
        paper="2310.08419",
        homepage="https://github.com/patrickrchao/JailbreakingLLMs",
        parts=(Part(("harmful_behaviors_custom.csv", "advbench_pair50.csv"), intent="harmful"),),
        text=("goal",),
        identity="Original index",
        category=("category",),
        harmful=50,
    ),
    _HARMBENCH,
    replace(
        _HARMBENCH,
        name="harmbench-contextual",
        title="HarmBench, contextual behaviours, test",
        only={"FunctionalCategory": ("contextual",)},
        harmful=81,
        note="the context goes before the request, as in HarmBench's direct requests",
    ),
    replace(
        _HARMBENCH,
        name="harmbench-copyright",
        title="HarmBench, copyright behaviours, test",
        only={"FunctionalCategory": ("copyright",)},
        harmful=80,
        note="asks for protected text: HarmBench judges it by overlap with the text, not by refusal",
    ),
    replace(
        _HARMBENCH,
        name="harmbench-val",
        title="HarmBench, standard behaviours, validation",
        parts=(_VALIDATION,),
        harmful=41,
    ),
    replace(
        _HARMBENCH,
        name="harmbench-all",
        title="HarmBench, standard and contextual behaviours",
        parts=(_VALIDATION, *_HARMBENCH.parts),
        only={"FunctionalCategory": ("standard", "contextual")},
        harmful=300,
        note="validation (60) and test (240); without copyright behaviours",
    ),
    Suite(
        name="jailbreakbench",
        title="JailbreakBench behaviours",
        licence="MIT",
        paper="2404.01318",
        homepage="https://github.com/JailbreakBench/jailbreakbench",
        parts=(
            Part(("harmful-behaviors.csv",), "data/harmful-behaviors.csv", intent="harmful", tag="harmful"),
            Part(("benign-behaviors.csv",), "data/benign-behaviors.csv", intent="benign", tag="benign", twin="harmful"),
        ),
        hub="JailbreakBench/JBB-Behaviors",
        text=("Goal",),
        identity="Index",
        category=("Category",),
        harmful=100,
        benign=100,
        note="benign behaviour k is about the same thing as harmful behaviour k",
    ),
    Suite(
        name="strongreject",
        title="StrongREJECT forbidden prompts",
        licence="MIT; prompts from earlier sets under theirs",
        paper="2402.10260",
        homepage="https://github.com/alexandrasouly/strongreject",
        parts=(
            Part(
                ("strongreject_dataset.csv", "strongreject.csv"), "data/train-00000-of-00001.parquet", intent="harmful"
            ),
        ),
        hub="walledai/StrongREJECT",
        gated=True,
        text=("forbidden_prompt", "prompt"),
        category=("category",),
        harmful=313,
    ),
    _OR_BENCH,
    replace(
        _OR_BENCH,
        name="or-bench-toxic",
        title="OR-Bench toxic",
        parts=(Part(("or-bench-toxic.csv",), "or-bench-toxic.csv", intent="harmful"),),
    ),
    replace(
        _OR_BENCH,
        name="or-bench-80k",
        title="OR-Bench, all seemingly toxic prompts",
        parts=(Part(("or-bench-80k.csv",), "or-bench-80k.csv", intent="benign"),),
    ),
    Suite(
        name="coconot",
        title="CoCoNot, original and contrast",
        licence="ODC-BY",
        paper="2407.12043",
        homepage="https://github.com/allenai/noncompliance",
        parts=(
            Part(("coconot_eval.jsonl",), "original/test-00000-of-00001.parquet"),
            Part(("coconot_contrast_eval.jsonl",), "contrast/test-00000-of-00001.parquet", intent="benign"),
        ),
        hub="allenai/coconot",
        label="category",
        labels={"Requests with safety concerns": "harmful"},
        identity="id",
        category=("category", "subcategory"),
        harmful=395,
        benign=379,
        note="of the original, only requests with safety concerns: the other 606 (incomplete, unsupported, "
        "indeterminate, humanizing) should not be complied with either, but for no harm in them",
    ),
    Suite(
        name="oktest",
        title="OKTest",
        licence="none stated",
        paper="2401.17633",
        homepage="https://github.com/InvokerStark/OverKill",
        parts=(Part(("OKTest.csv",), intent="benign"),),
        benign=300,
    ),
    Suite(
        name="hh-red-team",
        title="HH-RLHF red-team attempts, first turns",
        licence="MIT",
        paper="2209.07858",
        homepage="https://github.com/anthropics/hh-rlhf",
        parts=(
            Part(
                ("red_team_attempts.jsonl.gz", "red_team_attempts.jsonl"),
                "red-team-attempts/red_team_attempts.jsonl.gz",
                intent="harmful",
            ),
        ),
        hub="Anthropic/hh-rlhf",
        text=("transcript",),
        first_turn=True,
        category=("tags",),
        note="harmful says what the writer was after; many first turns are harmless in themselves",
    ),
    Suite(
        name="malicious-instruct",
        title="MaliciousInstruct",
        licence="none stated",
        paper="2310.06987",
        homepage="https://github.com/Princeton-SysML/Jailbreak_LLM",
        parts=(Part(("MaliciousInstruct.txt", "malicious_instruct.txt"), intent="harmful"),),
        text=("text",),
        harmful=100,
    ),
    _TUNED,
    replace(
        _TUNED,
        name="stl-cona",
        title="Safety-Tuned LLaMAs, I-CoNa (hateful)",
        parts=(Part(("I-CoNa.json",), intent="harmful"),),
        harmful=178,
    ),
    replace(
        _TUNED,
        name="stl-controversial",
        title="Safety-Tuned LLaMAs, I-Controversial",
        parts=(Part(("I-Controversial.json",), intent="harmful"),),
        harmful=40,
    ),
    replace(
        _TUNED,
        name="stl-physical-safety",
        title="Safety-Tuned LLaMAs, I-PhysicalSafety",
        parts=(
            Part(("I-PhysicalSafetyUnsafe.json",), intent="harmful"),
            Part(("I-PhysicalSafetySafe.json",), intent="benign"),
        ),
        harmful=100,
        benign=100,
    ),
    replace(
        _TUNED,
        name="stl-q-harm",
        title="Safety-Tuned LLaMAs, Q-Harm",
        parts=(Part(("Q-Harm.json",), intent="harmful"),),
        harmful=100,
        note="unlabelled first questions of red-team conversations; many are harmless",
    ),
    _direction("train", harmful=260, benign=18_793),
    _direction("val", harmful=39, benign=6_264),
    _DIRECTION,
)
