"""What a diagnosis is about: the spec, its prompts and the unsteered answers, and what the spec is set beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demur.data.prompts import load_prompts, prompts_hash, take
from demur.errors import InputError
from demur.eval.anatomy import Instruments
from demur.eval.complete import Completions
from demur.eval.downstream import LinearProbe, fit_probe, usual
from demur.eval.interventions import (
    BARE,
    BASE,
    Intervention,
    choose_controls,
    edited_latents,
    ladder,
    parts,
    with_latents,
)
from demur.eval.observe import Bench, Steered, Text, observe, read_batch, typed_answer
from demur.features.controls import firing_rates, random_direction
from demur.features.openings import Openings, find_openings
from demur.judges.rules import RulesJudge
from demur.lm.batches import batches, pad
from demur.lm.chat import chat_ids, text_ids, with_system
from demur.lm.record import read_at
from demur.record import read_json, write_json
from demur.sae.base import Sae
from demur.sae.store import LoadedSae, check_fits, load_sae
from demur.spec import DirectionEdit, Edit, SteeringSpec
from demur.steering.artefacts import Artefacts
from demur.steering.direction import Direction, difference_in_means, load_direction, save_direction
from demur.steering.edits_at import lowest_hookpoint
from demur.steering.steer import steer
from demur.types import SAFETY_SYSTEM_PROMPT, UNSTEERED, Hookpoint, Label, Prompt, Run, parse_hookpoint
from demur.verbs.run_folder import check_folder, config_hash, new_run
from demur.verbs.steered import Loaded, load_steered
from demur.verbs.why_config import Why, WhyConfig

SETUP, VECTORS = "setup.json", "vectors"
TOGETHER = 4
"""Prompts in a pass: logits over the whole vocabulary of every token fill 100 MB for each."""
_MOVED = 12
"""Select prompts of each kind on which the length of the spec's move is measured."""
_STEERED_VIEW, _SAFETY = "steered", "safety"


@dataclass
class Diagnosing:
    """A diagnosis in progress."""

    config: WhyConfig
    folder: Path
    loaded: Loaded
    hookpoint: Hookpoint
    """The lowest place that the spec looks at or edits."""
    second: LoadedSae | None
    plain: list[Prompt]
    """Reported on; test split."""
    harmful: list[Prompt]
    select: list[Prompt]
    """Harmful and plain ones on which everything is fitted and chosen."""
    notes: list[str] = field(default_factory=list)
    judge: RulesJudge = field(default_factory=RulesJudge)

    @property
    def spec(self) -> SteeringSpec:
        """The spec that is diagnosed."""
        return self.loaded.spec

    @cached_property
    def completions(self) -> Completions:
        """Answers under the usual system prompt."""
        return Completions(self.folder / "completions.jsonl")

    @cached_property
    def bare(self) -> Completions:
        """Unsteered answers under the chat template's own system prompt."""
        return Completions(self.folder / "bare.jsonl")

    @cached_property
    def found(self) -> Artefacts:
        """SAEs that the spec names."""
        return Artefacts(self.loaded.lm.model, self.loaded.saes, self.loaded.directions, {})

    @property
    def places(self) -> list[Hookpoint]:
        """The lowest edited block, one halfway up and the last."""
        low, top = self.edited[0].block, self.loaded.lm.n_blocks - 1
        return [Hookpoint(block) for block in sorted({low, (low + top + 1) // 2, top})]

    @property
    def edited(self) -> list[Hookpoint]:
        """Where the spec edits, lowest first."""
        found = {parse_hookpoint(edit.hookpoint) for edit in self.spec.edits}
        return sorted(found, key=lambda place: place.block)

    @cached_property
    def systems(self) -> dict[str, str]:
        """System prompts by view."""
        config = self.config
        found = {BASE: config.system, _STEERED_VIEW: self.spec.system or config.system, BARE: ""}
        return {**found, _SAFETY: config.system or SAFETY_SYSTEM_PROMPT}

    def label(self, prompt: Prompt, spec: str, where: Completions | None = None) -> Label:
        """What the judge says of an answer."""
        return self.judge.judge(prompt, (where or self.completions).of(spec, [prompt])[0]).label

    def texts(self, prompts: Sequence[Prompt], view: str, answered: bool = True) -> list[Text]:
        """The prompts as the view reads them, with the unsteered answers; those without one are left out."""
        said = self.bare if view in (BARE, _SAFETY) and self.config.system else self.completions
        found = []
        for prompt in prompts:
            answer = text_ids(self.loaded.lm, said.of(UNSTEERED, [prompt])[0].text) if answered else []
            if answer or not answered:
                messages = with_system(prompt, self.systems[view])
                found.append(typed_answer(self.loaded.lm, prompt.id, messages, answer))
        return found

    def bench(self, interventions: Sequence[Intervention], vectors: Sequence[Direction]) -> Bench:
        """Where passes begin, and all that specs name."""
        low = lowest_hookpoint([one.spec for one in interventions]) or self.hookpoint
        return Bench(self.loaded.lm, low, self.loaded.saes, [*self.loaded.directions, *vectors])

    @cached_property
    def openings(self) -> Openings | None:
        """How the unsteered model begins a refusal; None where it never refuses."""
        said = [(prompt, self.completions.of(UNSTEERED, [prompt])[0]) for prompt in self.select]
        labels = [self.judge.judge(prompt, one).label for prompt, one in said]
        ids = [text_ids(self.loaded.lm, one.text) for _, one in said]
        refused = [row for row, label in zip(ids, labels, strict=True) if label == "refused"]
        try:
            return find_openings(refused, [row for row, label in zip(ids, labels, strict=True) if label == "complied"])
        except InputError:
            return None

    def sae_of(self, edit: Edit) -> Sae:
        """The SAE of an edit."""
        return self.found.sae(edit.sae, parse_hookpoint(edit.hookpoint), edit.latents)


def begin(config: Why) -> tuple[Diagnosing, Run]:
    """Load what `config` names and try the spec; nothing is written.

    Raises as `load_steered` and `steer` do, `InputError` for a spec without edits, and `RunExistsError` when the run
    folder holds another run.
    """
    what = config.config if config.file is None else replace(config.config, spec=config.file)
    folder = config.out or Path("runs") / f"{what.name}-{config_hash(what)[:8]}"
    check_folder(folder, what)
    plain, harmful = load_prompts("plain", "benign"), load_prompts("harmful", "harmful")
    second = load_sae(what.second_sae) if what.second_sae else None
    loaded = load_steered(replace(what, system=""), need_spec=True)
    lm, spec = loaded.lm, loaded.spec
    hookpoint = lowest_hookpoint([spec])
    if hookpoint is None:
        raise InputError("the spec has no edits, so there is no damage to explain; give one that steers")
    with steer(lm, spec, loaded.saes, directions=loaded.directions):
        pass
    if second is not None:
        check_fits(second, lm.name, lm.fingerprint, lm.d_model, lm.n_blocks)
        if parse_hookpoint(second.config.hookpoint).block < hookpoint.block:
            raise InputError(
                f"the second SAE reads {second.config.hookpoint}, below the edit at {hookpoint}, where nothing "
                "changes; give one of a later block"
            )
    _check_controls(what, spec, loaded)
    several = what.prompts * 3 // 2
    select = [*take(harmful, "select", several), *take(plain, "select", several)]
    tested = take(plain, "test", what.prompts), take(harmful, "test", what.prompts)
    going = Diagnosing(what, folder, loaded, hookpoint, second, *tested, select)
    run = new_run(
        "why",
        what,
        {
            "model": lm.identity,
            "spec": spec.hash,
            "second SAE": second.hash if second else "",
            "prompts": prompts_hash([*tested[0], *tested[1], *select]),
        },
    )
    return going, run


def _check_controls(config: WhyConfig, spec: SteeringSpec, loaded: Loaded) -> None:
    edited = edited_latents(spec)
    own = [latent for _, _, latent in edited]
    if config.control and not own:
        raise InputError("the spec edits raw directions, for which no control latent stands; leave --control out")
    if both := set(config.control) & set(own):
        raise InputError(f"latent {min(both)} is edited by the spec and cannot be its control; give other latents")
    if config.control and len(config.control) % len(own):
        raise InputError(
            f"{len(config.control)} control latents were given for {len(own)} edited ones; give one for each, or a "
            "multiple"
        )
    found = Artefacts(loaded.lm.model, loaded.saes, loaded.directions, {})
    for place, sae, _ in edited:
        found.sae(sae, parse_hookpoint(place), config.control)


@dataclass
class Setup:
    """What the spec is set beside."""

    interventions: list[Intervention]
    vectors: list[Direction]


def set_up(going: Diagnosing) -> Setup:
    """Choose controls, measure how far the spec moves the residual, and make directions as long; kept in the folder."""
    path = going.folder / SETUP
    if not path.exists():
        rows: dict[str, Any] = {"controls": _controls(going), "lengths": _lengths(going)}
        _make_vectors(going, rows["lengths"])
        write_json(path, rows)
    kept = read_json(path)
    spec, doses = going.spec, going.config.doses
    view = _STEERED_VIEW if spec.system and spec.system != going.config.system else BASE
    found = parts(spec, view)
    found += [one for one in ladder(found[0], doses) if one.dose != 1]
    saes = {edit.sae: going.sae_of(edit) for edit in spec.edits if isinstance(edit, Edit)}
    own = [latent for _, _, latent in edited_latents(spec)]
    for number, row in enumerate(kept["controls"]):
        others = with_latents(spec, dict(zip(own, row, strict=True)), saes)
        name = f"control latent{'s' if len(row) > 1 else ''} {', '.join(map(str, row))}"
        one = Intervention(
            f"control {number + 1}", "control", name, others, view=view, full=True, asked=None if number else others
        )
        found += ladder(one, doses if not number else (1,))
    vectors = []
    for number in range(going.config.random + 1):
        edits = []
        for place in going.edited:
            vector = load_direction(_vector(going, place, number))
            vectors.append(vector)
            length = float(kept["lengths"][str(place)]) / float(vector.vector.norm())
            edits.append(DirectionEdit(str(place), vector.hash, length))
        pushed = replace(spec, edits=tuple(edits), mode="error_preserving")
        one = Intervention("means", "means", "difference in means", pushed, view=view, full=True)
        if number < 2:
            one = replace(one, asked=pushed)
        if number:
            one = replace(one, key=f"random {number}", kind="random", label=f"random direction {number}")
        found += ladder(one, doses if number < 2 else (1,))
    safety = SteeringSpec(system=going.systems[_SAFETY])
    base = BARE if going.config.system else BASE
    asked = None if going.config.system else safety  # else it is in force on all sides, the unsteered one too
    found.append(Intervention("prompt", "prompt", "safety system prompt", safety, view=_SAFETY, base=base, asked=asked))
    return Setup([_answerable(going, one, vectors) for one in found], vectors)


def _answerable(going: Diagnosing, one: Intervention, vectors: Sequence[Direction]) -> Intervention:
    """`one`, asked for answers only if its positions can be told under the model's chat template."""
    if one.kind in ("only", "but") and one.asked is not None:
        named = [*going.loaded.directions, *vectors]
        try:
            with steer(going.loaded.lm, one.asked, going.loaded.saes, directions=named):
                pass
        except InputError:
            return replace(one, asked=None)
    return one


def _vector(going: Diagnosing, place: Hookpoint, number: int) -> Path:
    return going.folder / VECTORS / f"{f'random-{number}' if number else 'means'}-{place.block}.safetensors"


def _controls(going: Diagnosing) -> list[list[int]]:
    """Latents in place of the spec's, several choices; none for a spec that they cannot stand for."""
    spec, config = going.spec, going.config
    own = [latent for _, _, latent in edited_latents(spec)]
    if not own or len({(place, sae) for place, sae, _ in edited_latents(spec)}) > 1:
        return []
    if config.control:
        return [list(config.control[i : i + len(own)]) for i in range(0, len(config.control), len(own))]
    edit = spec.edits[0]
    assert isinstance(edit, Edit)
    sae, place = going.sae_of(edit), parse_hookpoint(edit.hookpoint)
    rates = []
    for intent in ("benign", "harmful"):
        prompts = [prompt for prompt in going.select if prompt.intent == intent]
        rows = [chat_ids(going.loaded.lm, with_system(prompt, config.system)) for prompt in prompts]
        rates.append(firing_rates(going.loaded.lm, sae, place, rows))
    try:
        generator = torch.Generator().manual_seed(config.seed)
        return choose_controls(sae, own, rates[0], rates[1], config.controls, generator)
    except InputError:
        return []


def _lengths(going: Diagnosing) -> dict[str, float]:
    """Mean length of the spec's moves at each place, over the tokens of select prompts that it moves."""
    halves = [[p for p in going.select if p.intent == intent][:_MOVED] for intent in ("harmful", "benign")]
    prompts = [prompt for half in halves for prompt in half]
    bench = going.bench([Intervention("edit", "edit", "", going.spec)], [])
    view = _STEERED_VIEW if going.spec.system else BASE
    moves: dict[str, list[Tensor]] = {str(place): [] for place in going.edited}
    texts = going.texts(prompts, view)
    for chosen in batches([len(text.ids) for text in texts], TOGETHER):
        seen = observe(bench, read_batch(bench, [texts[i] for i in chosen]), Steered(going.spec), 1)
        for name, old in seen.before.items():
            length = (seen.after[name] - old).float().norm(dim=-1).flatten()
            moves[name].append(length[length > 0].cpu())
    found = {name: torch.cat(some) if some else torch.zeros(0) for name, some in moves.items()}
    if still := [name for name, length in found.items() if not len(length)]:
        raise InputError(
            f"the spec moves no token of {len(texts)} select prompts at {still[0]}, harmful ones among them; look at "
            "its gate, positions and values"
        )
    return {name: float(length.mean()) for name, length in found.items()}


def _make_vectors(going: Diagnosing, lengths: dict[str, float]) -> None:
    lm = going.loaded.lm
    generator = torch.Generator().manual_seed(going.config.seed)
    ends = _read_select(going, going.edited)
    for place in going.edited:
        name = str(place)
        halves = [
            torch.stack([x[text.start - 1] for text, x, prompt in ends[name] if prompt.intent == intent])
            for intent in ("harmful", "benign")
        ]
        save_direction(_vector(going, place, 0), difference_in_means(halves[0], halves[1], name))
        for number in range(1, going.config.random + 1):
            vector = random_direction(lm.d_model, lengths[name], name, generator)
            save_direction(_vector(going, place, number), vector)


def _read_select(going: Diagnosing, places: Sequence[Hookpoint]) -> dict[str, list[tuple[Text, Tensor, Prompt]]]:
    """By place, unsteered residuals [tokens, d_model] of every select prompt with its answer, if it has one."""
    lm = going.loaded.lm
    found: dict[str, list[tuple[Text, Tensor, Prompt]]] = {str(place): [] for place in places}
    texts = []
    for prompt in going.select:
        with_answer = going.texts([prompt], BASE)
        texts.append((with_answer or going.texts([prompt], BASE, answered=False))[0])
    for chosen in batches([len(text.ids) for text in texts], TOGETHER):
        padded = pad(lm, [texts[i].ids for i in chosen], side="right")
        for place, x in zip(places, read_at(lm.model, places, padded.ids, padded.mask), strict=True):
            found[str(place)] += [
                (texts[i], x[row, : len(texts[i].ids)].float().cpu(), going.select[i]) for row, i in enumerate(chosen)
            ]
    return found


def instruments(going: Diagnosing) -> Instruments:
    """Distances, probes and SAEs that look at later blocks, fitted on select prompts."""
    read = _read_select(going, going.places)
    known, probes = {}, {}
    for place, some in read.items():
        ordered = sorted(some, key=lambda one: one[2].id)
        bodies = [x[text.body :] for text, x, _ in ordered]
        known[place] = usual(torch.cat(bodies[::2]), torch.cat(bodies[1::2]))
        labels = [going.label(prompt, UNSTEERED) for _, _, prompt in ordered]
        sides: dict[str, list[bool | None]] = {
            "harm": [prompt.intent == "harmful" for _, _, prompt in ordered],
            "refusal": [{"refused": True, "complied": False}.get(label) for label in labels],
        }
        for what, classes in sides.items():
            probe = _probe(ordered, classes, going.config.seed)
            if probe is not None:
                probes[what, place] = probe
    lenses: dict[str, tuple[str, Sae]] = {}
    for edit in going.spec.edits:
        if isinstance(edit, Edit) and parse_hookpoint(edit.hookpoint) == going.edited[0]:
            lenses["the edit's SAE"] = (str(going.edited[0]), going.sae_of(edit))
    if going.second is not None:
        upper = parse_hookpoint(going.second.config.hookpoint)
        lenses["the second SAE"] = (str(upper), going.second.sae.to(going.found.device(upper)))
    return Instruments(known, probes, lenses)


def _probe(
    ordered: Sequence[tuple[Text, Tensor, Prompt]], classes: Sequence[bool | None], seed: int
) -> LinearProbe | None:
    ends = [
        torch.stack(some) if some else torch.zeros(0, 1)
        for some in (
            [x[text.start - 1] for (text, x, _), mine in zip(ordered, classes, strict=True) if mine is wanted]
            for wanted in (True, False)
        )
    ]
    return fit_probe(ends[0], ends[1], seed)
