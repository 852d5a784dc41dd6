"""`demur verify`: the invariants of steering, run on the user's own model, spec and SAE."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from demur import progress
from demur.data.prompts import load_prompts, take
from demur.errors import InputError
from demur.lm.attach import Step, attach, prompt_lengths
from demur.lm.batches import pad
from demur.lm.chat import chat_ids, with_system
from demur.spec import Edit, SteeringSpec, TextGate
from demur.steering.artefacts import Artefacts
from demur.steering.oracle import expected
from demur.steering.steer import steer
from demur.types import parse_hookpoint
from demur.verbs.config import Verify
from demur.verbs.steered import Loaded, load_steered

_PROMPTS = 4
_NEW_TOKENS = 12


@dataclass(frozen=True)
class Check:
    """One invariant and what was measured."""

    name: str
    passed: bool
    measured: str


@dataclass(frozen=True)
class Verified:
    """What `demur verify` found."""

    spec: str
    """Hash of the spec."""
    model: str
    passed: bool
    checks: tuple[Check, ...]


class _Failure(Exception):
    """Raised on purpose inside a `with steer` block."""


def verify(config: Verify) -> Verified:
    """Run every check. A failed check is a result, not an error; raises as `load_steered` and `steer` do."""
    steered = config.steered
    if config.file is not None:
        if steered.spec is not None:
            raise InputError(f"two specs were given, {config.file} and {steered.spec}; give one")
        steered = replace(steered, spec=config.file)
    loaded = load_steered(steered, need_spec=True)
    if isinstance(loaded.spec.gate, TextGate):
        raise InputError(
            f"the spec's gate asks {loaded.spec.gate.classifier} about the conversation's text before the model runs, "
            "so there is nothing of it to be verified here; verify the spec without its gate"
        )
    checks = _Checks(loaded)
    found = []
    with progress.track("checks", len(checks.all), "checks") as advance:
        for name, check in checks.all.items():
            passed, measured = check()
            found.append(Check(name, passed, measured))
            advance(1)
    return Verified(loaded.spec.hash, loaded.lm.name, all(check.passed for check in found), tuple(found))


class _Checks:
    def __init__(self, loaded: Loaded) -> None:
        self._lm, self._spec = loaded.lm, loaded.spec
        self._loaded = loaded
        harmful = take(load_prompts("harmful", "harmful"), "select", _PROMPTS)
        plain = take(load_prompts("plain", "benign"), "select", _PROMPTS)
        self._rows = [chat_ids(self._lm, with_system(prompt, loaded.system)) for prompt in (*harmful, *plain)]
        self._whole = self._lm.model.dtype == torch.float32
        self.all: dict[str, Callable[[], tuple[bool, str]]] = {
            "equals encode, edit, decode, add the error back (float64)": self._exact,
            "padding and what the spec leaves out keep their bits": self._elsewhere,
            "each row of a batch equals the row alone": self._batched,
            "with a KV cache equals without": self._cached,
            "each row under its own spec equals the row alone": self._per_row,
            "the model is itself again after an error": self._restored,
            "every edit moved some token": self._applied,
        }

    def _steer(self, spec: Any = None) -> Any:
        return steer(
            self._lm, self._spec if spec is None else spec, self._loaded.saes, directions=self._loaded.directions
        )

    def _pass(self, side: str, spec: SteeringSpec | None = None) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """Residuals before and after each hookpoint of the spec over one padded batch, and its mask."""
        seen: dict[str, list[Tensor]] = {}
        batch = pad(self._lm, self._rows, side=side)
        places = dict.fromkeys(edit.hookpoint for edit in self._spec.edits)

        def look(name: str) -> Callable[[Tensor, Step], Tensor]:
            def keep(residual: Tensor, step: Step) -> Tensor:
                seen.setdefault(name, []).append(residual.detach().clone())
                return residual

            return keep

        # half of each row counts as written, so that every kind of position has tokens
        halves = batch.mask.sum(-1) // 2
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(prompt_lengths(self._lm.model, halves))
            for place in places:
                stack.enter_context(attach(self._lm.model, parse_hookpoint(place), look(place)))
            stack.enter_context(self._steer(spec))
            for place in places:
                stack.enter_context(attach(self._lm.model, parse_hookpoint(place), look(place)))
            self._lm.model(input_ids=batch.ids, attention_mask=batch.mask)
        return {name: (before, after) for name, (before, after) in seen.items()}, batch.mask

    def _exact(self) -> tuple[bool, str]:
        if not self._spec.exact:
            return True, "not checked: the spec asks for the fast threshold path, which is not exact"
        found = Artefacts(self._lm.model, self._loaded.saes, (), {})
        saes = {
            edit.sae: found.sae(edit.sae, parse_hookpoint(edit.hookpoint), edit.latents)
            for edit in self._spec.edits
            if isinstance(edit, Edit)
        }
        worst, unclear, tokens = 0.0, 0, 0
        # without its gate, which may stay shut on these prompts, and with edits that go all of their way
        whole = replace(self._spec, gate=None)
        whole = replace(whole, positions=replace(whole.positions, half_life=0))
        for name, (before, after) in self._pass("left", whole)[0].items():
            changed = (before != after).any(-1)
            x, got = before[changed], after[changed].double()
            wanted = expected(x, self._spec, parse_hookpoint(name), saes, self._loaded.directions)
            unclear += int((~wanted.decidable).sum())
            tokens += len(x)
            x, got, target = x[wanted.decidable], got[wanted.decidable], wanted.residual[wanted.decidable]
            if len(x):
                worst = max(worst, float((got - target).norm() / target.norm()))
        limit = 1e-5 if self._whole else 1e-2
        said = f"relative difference {worst:.1e} over {tokens} changed tokens, at most {limit:.0e}"
        return worst <= limit, said + (f"; {unclear} with a rank too close to call left out" if unclear else "")

    def _elsewhere(self) -> tuple[bool, str]:
        wrong = looked = 0
        for side in ("left", "right"):
            residuals, mask = self._pass(side)
            position = mask.cumsum(-1) - 1
            out = mask == 0
            if self._spec.skip_first:
                out |= (position == 0) & (mask == 1)
            for before, after in residuals.values():
                changed = (before != after).any(-1).to(out.device)
                # a lower edit may have changed what reaches this block, but not what this block's edit does
                wrong += int((changed & out).sum())
                looked += int(out.sum())
        return wrong == 0, f"{wrong} of {looked} such tokens changed"

    def _written(self, rows: list[list[int]], spec: Any = None, **settings: Any) -> list[list[int]]:
        model: Any = self._lm.model
        batch = pad(self._lm, rows, side="left")
        with self._steer(spec), torch.no_grad():
            ids = model.generate(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                do_sample=False,
                max_new_tokens=_NEW_TOKENS,
                min_new_tokens=_NEW_TOKENS,
                pad_token_id=self._lm.pad_id,
                **settings,
            )
        written: list[list[int]] = ids[:, batch.ids.shape[1] :].tolist()
        return written

    def _same(self, one: list[list[int]], other: list[list[int]]) -> tuple[bool, str]:
        equal = sum(a == b for a, b in zip(one, other, strict=True))
        # below single precision a batch of another shape rounds otherwise, so near-ties may turn
        needed = len(one) if self._whole else len(one) / 2
        return equal >= needed, f"{equal} of {len(one)} greedy answers of {_NEW_TOKENS} tokens are the same"

    def _batched(self) -> tuple[bool, str]:
        return self._same(self._written(self._rows), [self._written([row])[0] for row in self._rows])

    def _cached(self) -> tuple[bool, str]:
        rows = self._rows[:_PROMPTS]
        return self._same(self._written(rows), self._written(rows, use_cache=False))

    def _per_row(self) -> tuple[bool, str]:
        specs = [self._spec if i % 2 else None for i in range(len(self._rows))]
        alone = [self._written([row], spec or SteeringSpec())[0] for row, spec in zip(self._rows, specs, strict=True)]
        return self._same(self._written(self._rows, specs), alone)

    def _restored(self) -> tuple[bool, str]:
        batch = pad(self._lm, self._rows, side="left")

        def logits() -> Tensor:
            with torch.no_grad():
                found: Tensor = self._lm.model(input_ids=batch.ids, attention_mask=batch.mask).logits
            return found

        before = logits()
        try:
            with self._steer():
                logits()
                raise _Failure
        except _Failure:
            pass
        after = logits()
        return torch.equal(before, after), f"largest difference of the logits {float((before - after).abs().max()):.1e}"

    def _applied(self) -> tuple[bool, str]:
        batch = pad(self._lm, self._rows, side="left")
        model: Any = self._lm.model
        with self._steer() as steering, torch.no_grad():
            model.generate(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                do_sample=False,
                max_new_tokens=_NEW_TOKENS,
                pad_token_id=self._lm.pad_id,
            )
        slots = steering.counts()
        still = [slot.name for slot in slots if not sum(slot.changed)]
        total = sum(sum(slot.changed) for slot in slots)
        if not slots:
            return False, "the spec has no edits"
        if still and self._spec.gate is not None:
            return True, f"{total} tokens changed; the gate stayed shut for {', '.join(still)}"
        return not still, f"{total} tokens changed" + (f", none by {', '.join(still)}" if still else "")
