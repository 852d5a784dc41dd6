"""`demur sae train`: text -> residuals, on disk or as they come -> SAEs, their cards and their held-out measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from demur import progress
from demur.data.corpus import Corpus
from demur.errors import InputError, MissingExtraError, RunExistsError
from demur.eval.reconstruction import ce_recovered
from demur.lm.harvest import harvest, norm_limits, residuals, shared_residuals
from demur.lm.hookpoints import block_at
from demur.lm.load import LanguageModel, load
from demur.lm.token_types import TYPES, Typed
from demur.parallel import Processes, joined
from demur.record import provenance, read_json, storage, to_json, whole_file, write_json, write_text
from demur.sae.base import Sae
from demur.sae.config import TrainConfig
from demur.sae.metrics import Measured, Tokens, measure
from demur.sae.store import SaeConfig, SaeModel, load_sae, save_sae
from demur.sae.training.activations import Batch, Pools, Position, Shards
from demur.sae.training.trainer import StepReport, Trainer
from demur.types import Hookpoint, parse_hookpoint, stable_hash
from demur.verbs.config import SaeTrain
from demur.verbs.documents import Split, groups, read_group, split
from demur.verbs.sae_card import card

_CHECKPOINT_STEPS = 200
_LOG_STEPS = 50
_SAMPLE = 16_384
"""Tokens that scale and initialisation are fitted on."""
_CE_TEXTS = 64
_INTERIM_CE_TEXTS = 8
_INTERIM_TOKENS = 16_384
_REFERENCE_TOKENS = 1_000_000
"""Tokens of training text at most that reference statistics are taken on."""
_MADE = ("commit", "dirty", "versions", "started", "command")
"""What a card says of how its SAE was made."""


class _Job(NamedTuple):
    """What every part of a training run needs to know."""

    config: SaeTrain
    lm: LanguageModel
    hookpoints: list[Hookpoint]
    corpus: Corpus
    parts: Split
    work: Path
    processes: Processes

    def rows(self, numbers: Sequence[int]) -> list[Typed]:
        """Rows of the documents `numbers`."""
        return read_group(self.lm, self.corpus, numbers, self.config.context)

    def groups(self, numbers: Sequence[int]) -> list[list[int]]:
        """`numbers` in groups that are harvested together."""
        return groups(self.corpus, numbers, self.config.pool_tokens)


class _Source(NamedTuple):
    """Where batches come from."""

    sample: dict[str, torch.Tensor]
    """Residuals that scale and initialisation are fitted on, by hookpoint."""
    total_steps: int
    batches: Callable[[Position], Iterator[Batch]]
    residuals: Callable[[str], Iterator[Tokens]]
    """Training text again, for reference statistics, by hookpoint."""
    about: dict[str, Any]
    """What the cards say of it."""


class _Run(NamedTuple):
    """One SAE being trained."""

    hookpoint: str
    config: TrainConfig
    trainer: Trainer
    out: Path


class _Heldout(NamedTuple):
    """What the SAEs are measured on."""

    shards: Shards
    rows: list[Typed]
    """Documents to measure cross entropy on."""


def sae_train(config: SaeTrain) -> list[dict[str, Any]]:
    """Train the SAEs that `config` describes; returns the `cfg.json` of each, with its hash and path.

    Harvest and training go on where an interrupted call stopped, to the same weights. Under torchrun the processes
    share each batch; only the first returns the SAEs, the others an empty list.
    """
    if config.device == "auto":
        raise InputError("sae train needs one device for model and SAEs; give cpu, cuda or cuda:1")
    if config.tensorboard:
        _tensorboard()
    work = config.work or config.out / "work"
    made = provenance()
    with joined(config.device) as processes:
        lm = load(config.model, config.dtype, config.device)
        hookpoints = [parse_hookpoint(text) for text in config.hookpoint]
        for hookpoint in hookpoints:
            block_at(lm.model, hookpoint)
        corpus = Corpus(config.data, config.weights, config.recipe.seed)
        parts = split(lm, corpus, config.context, config.max_tokens, config.heldout)
        _claim(work, {**_settings(config), "text": corpus.hashes}, processes)
        progress.say(f"{len(parts.trained)} documents to train on, {len(parts.heldout)} held out")
        job = _Job(config, lm, hookpoints, corpus, parts, work, processes)
        heldout = _hold_out(job)
        source = _disk(job) if config.source == "disk" else _stream(job)
        runs = _runs(job, source)
        _train(job, runs, source, heldout)
        if not processes.first:
            return []
    about = {**_about(job, heldout), **source.about, **{key: made[key] for key in _MADE}}
    return [_finish(config, lm, run, source, heldout, about) for run in runs]


def _settings(config: SaeTrain) -> dict[str, Any]:
    """What decides the weights. How often they are looked at, or where they are kept, does not."""
    left_out = ("json", "out", "work", "data", "evaluations", "tensorboard", "half")
    return {key: value for key, value in to_json(config).items() if key not in left_out}


def _claim(work: Path, settings: dict[str, Any], processes: Processes) -> None:
    path = work / "settings.json"
    if path.exists() and read_json(path) != settings:
        raise RunExistsError(f"{work} holds the work of another training run; give another --work or --out folder")
    processes.wait()
    if processes.first:
        write_json(path, settings)


def _runs(job: _Job, source: _Source) -> list[_Run]:
    config, made = job.config, []
    several = len(job.hookpoints) * len(config.d_sae) * len(config.k) > 1
    for hookpoint, d_sae, k in product(map(str, job.hookpoints), config.d_sae, config.k):
        one = config.one(d_sae, k)
        trainer = Trainer(source.sample[hookpoint].to(config.device), one, source.total_steps, job.processes)
        out = config.out / hookpoint / f"{one.architecture}-{d_sae}-{k}" if several else config.out
        made.append(_Run(hookpoint, one, trainer, out))
    return made


def _key(job: _Job, rows: list[Typed]) -> str:
    config = job.config
    text = [list(job.corpus.hashes.values()), config.weights, config.max_tokens, config.context, config.heldout]
    model = [job.lm.fingerprint, config.dtype, [str(h) for h in job.hookpoints]]
    return stable_hash([text, [list(row.ids) for row in rows[:8]], config.pool_tokens, *model])


def _harvested(job: _Job, numbers: list[int], folder: Path) -> None:
    made = [partial(job.rows, group) for group in job.groups(numbers)]
    key = _key(job, made[0]())
    harvest(job.lm, job.hookpoints, made, key, folder, job.config.recipe.seed, job.processes)


def _hold_out(job: _Job) -> _Heldout:
    _harvested(job, job.parts.heldout, job.work / "heldout")
    return _Heldout(Shards(job.work / "heldout"), job.rows(job.parts.heldout[:_CE_TEXTS])[:_CE_TEXTS])


def _disk(job: _Job) -> _Source:
    _harvested(job, job.parts.trained, job.work / "train")
    shards = Shards(job.work / "train", job.processes)
    recipe = job.config.recipe
    return _Source(
        {str(h): shards.sample(str(h), _SAMPLE) for h in job.hookpoints},
        shards.steps_per_round(recipe.batch_size) * job.config.epochs,
        lambda start: shards.batches(recipe.batch_size, recipe.seed, start),
        lambda hookpoint: (Tokens(x, types) for x, types in shards.residuals(hookpoint)),
        {"tokens": shards.tokens, "tokens_left_out": round(shards.left_out, 5)},
    )


def _stream(job: _Job) -> _Source:
    lm, hookpoints, recipe = job.lm, job.hookpoints, job.config.recipe
    text = job.groups(job.parts.trained)
    first = job.rows(text[0])
    limits = norm_limits(lm, hookpoints, first[:32])
    begin = residuals(lm, hookpoints, first[: max(2, _SAMPLE // job.config.context)], limits)

    def pool(number: int) -> dict[str, torch.Tensor]:
        return shared_residuals(lm, hookpoints, job.rows(text[number % len(text)]), limits, job.processes).x

    def again(hookpoint: str) -> Iterator[Tokens]:
        for group in text:
            found = residuals(lm, hookpoints, job.rows(group), limits)
            yield Tokens(found.x[hookpoint], found.types)

    pools = Pools(pool, job.processes)
    kept = len(begin.types) / begin.seen
    tokens = int(job.parts.tokens * kept)
    steps = tokens * job.config.epochs // recipe.batch_size
    if not steps:
        raise InputError(f"{tokens} tokens are fewer than one batch of {recipe.batch_size}; give more text")
    return _Source(
        {name: x.float() for name, x in begin.x.items()},
        steps,
        lambda start: pools.batches(recipe.batch_size, recipe.seed, start),
        again,
        {"tokens": tokens, "tokens_left_out": round(1 - kept, 5)},
    )


def _train(job: _Job, runs: list[_Run], source: _Source, heldout: _Heldout) -> None:
    """Train all of `runs` on the same batches, to the end, from the last checkpoint where there is one."""
    config, lm, work, processes = job.config, job.lm, job.work, job.processes
    checkpoint = work / "checkpoint.safetensors"
    position = _resume(checkpoint, runs)
    total, done = source.total_steps, runs[0].trainer.steps
    looks = {round(total * (i + 1) / (config.evaluations + 1)) for i in range(config.evaluations)}
    log = work / "train.jsonl"
    if processes.first:
        _forget(log, done)
    processes.wait()
    with (
        progress.track("train", total, "steps") as advance,
        _tensorboard(config.out / "tensorboard") if config.tensorboard and processes.first else _nowhere() as scalars,
    ):
        advance(done)
        for batch in islice(source.batches(position), total - done):
            reports = [run.trainer.step(batch.x[run.hookpoint]) for run in runs]
            step = reports[0].step
            if processes.first:
                if step % _LOG_STEPS == 0 or step in looks or step == total:
                    _log(log, runs, reports, scalars, _look(lm, runs, heldout) if step in looks else None)
                if step % _CHECKPOINT_STEPS == 0 or step == total:
                    _save(checkpoint, runs, batch.after)
            advance(1)


def _save(path: Path, runs: list[_Run], after: Position) -> None:
    tensors = {f"{i}.{name}": value for i, run in enumerate(runs) for name, value in run.trainer.state().items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"round": str(after.round), "batch": str(after.batch)})


def _resume(path: Path, runs: list[_Run]) -> Position:
    """Bring `runs` to the checkpoint at `path`, if there is one, and return where its next batch begins."""
    if not path.exists():
        return Position()
    try:
        with safe_open(path, framework="pt") as file:
            about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole checkpoint ({error}); delete it to train from the start") from None
    for i, run in enumerate(runs):
        prefix = f"{i}."
        run.trainer.restore({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return Position(int(about["round"]), int(about["batch"]))


def _forget(log: Path, done: int) -> None:
    """Remove lines of steps after `done` from `log`: they will be written again."""
    if log.exists():
        kept = [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= done]
        write_text(log, "".join(line + "\n" for line in kept))


def _look(lm: LanguageModel, runs: list[_Run], heldout: _Heldout) -> list[dict[str, Any]]:
    """Held-out measures of each SAE as it stands, on a part of the held-out text."""
    found = []
    for run in runs:
        sae = run.trainer.sae()
        measured = _measured(sae, heldout.shards, run.hookpoint, _INTERIM_TOKENS)
        numbers, by_type = measured.metrics._asdict(), _by_type(measured)
        recovered = ce_recovered(
            lm, sae, parse_hookpoint(run.hookpoint), [row.ids for row in heldout.rows[:_INTERIM_CE_TEXTS]]
        )
        found.append(
            {
                **numbers,
                **by_type,
                "ce_recovered": recovered.ce_recovered,
                "kl": recovered.kl,
                "latents_by_rate": {"counts": measured.rates.counts, "never": measured.rates.never},
            }
        )
        progress.say(
            f"  {run.out.name}: held-out FVU {numbers['fvu']:.4f}, L0 {numbers['l0']:.1f}, "
            f"CE recovered {recovered.ce_recovered:.4f}"
        )
    return found


def _measured(sae: Sae, shards: Shards, hookpoint: str, tokens: int) -> Measured:
    return measure(sae, _first((Tokens(x, types) for x, types in shards.residuals(hookpoint)), tokens))


def _by_type(measured: Measured) -> dict[str, float]:
    return {f"fvu_{TYPES[kind]}": fvu for kind, fvu in measured.fvu_by_type.items()}


def _first(batches: Iterator[Tokens], tokens: int) -> Iterator[Tokens]:
    left = tokens
    for batch in batches:
        if left <= 0:
            return
        yield Tokens(batch.x[:left], None if batch.types is None else batch.types[:left])
        left -= len(batch.x)


def _log(
    log: Path,
    runs: list[_Run],
    reports: list[StepReport],
    scalars: Callable[[str, float, int], None],
    looks: list[dict[str, Any]] | None,
) -> None:
    with storage(log), log.open("a", encoding="utf-8") as file:
        for i, (run, report) in enumerate(zip(runs, reports, strict=True)):
            line: dict[str, Any] = {"sae": run.out.name, "hookpoint": run.hookpoint, **report._asdict()}
            if looks:
                line["heldout"] = looks[i]
            file.write(json.dumps(line) + "\n")
            flat = {key: value for key, value in report._asdict().items() if key not in ("step", "tokens")}
            flat |= {
                f"heldout/{key}": value
                for key, value in (looks[i] if looks else {}).items()
                if key != "latents_by_rate"
            }
            for key, value in flat.items():
                scalars(f"{run.hookpoint}/{run.out.name}/{key}", value, report.step)


@contextmanager
def _nowhere() -> Iterator[Callable[[str, float, int], None]]:
    yield lambda name, value, step: None


def _tensorboard(folder: Path | None = None) -> Any:
    """Opens a log for TensorBoard in `folder`; without one, only says whether that can be done."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError("TensorBoard is not installed; run `pip install 'demur[tensorboard]'`") from None

    @contextmanager
    def opened() -> Iterator[Callable[[str, float, int], None]]:
        with SummaryWriter(str(folder)) as writer:
            yield writer.add_scalar

    return opened()


def _about(job: _Job, heldout: _Heldout) -> dict[str, Any]:
    config = job.config
    return {
        "passes": config.epochs,
        "source": config.source,
        "heldout_tokens": heldout.shards.tokens,
        "documents_by_source": job.parts.sources,
        "data": {Path(path).name: digest for path, digest in job.corpus.hashes.items()},
        "weights": job.lm.origin,
        "settings": to_json(config.recipe),
        "context": config.context,
        "stored": "float16" if config.half else "float32",
    }


def _finish(
    config: SaeTrain,
    lm: LanguageModel,
    run: _Run,
    source: _Source,
    heldout: _Heldout,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Store the SAE of `run`, measure it as stored, and write its card."""
    dtype = torch.float16 if config.half else torch.float32
    sae = run.trainer.sae()
    blank = SaeConfig(
        sae.d_in,
        sae.d_sae,
        run.config.k,
        run.hookpoint,
        SaeModel(lm.name, lm.fingerprint, lm.n_blocks),
        architecture=sae.kind,
        training={**about, "trained_as": run.config.architecture, "steps": run.trainer.steps},
    )
    save_sae(run.out, sae, blank, dtype)
    # measured on what was stored, so that half precision is in the numbers
    stored = load_sae(run.out).sae.to(config.device)
    measured = _measured(stored, heldout.shards, run.hookpoint, heldout.shards.tokens)
    # rare latents may be silent on the little text held out: dead is silent on all text
    held = (Tokens(x, types) for x, types in heldout.shards.residuals(run.hookpoint))
    everywhere = measure(stored, _first(chain(held, source.residuals(run.hookpoint)), _REFERENCE_TOKENS))
    sae.reference = everywhere.reference
    recovered = ce_recovered(lm, stored, parse_hookpoint(run.hookpoint), [row.ids for row in heldout.rows])
    numbers = {
        **{key: value for key, value in measured.metrics._asdict().items() if key != "dead"},
        **_by_type(measured),
        "fvu_training_text": everywhere.metrics.fvu,
        "dead": everywhere.metrics.dead,
        "dead_tokens": everywhere.metrics.tokens,
        "unit": stored.unit,
        **{k: v for k, v in recovered._asdict().items() if k != "tokens"},
    }
    final = SaeConfig(**{**vars(blank), "metrics": numbers})
    save_sae(run.out, sae, final, dtype)
    write_text(run.out / "README.md", card(final))
    return {**to_json(final), "hash": load_sae(run.out).hash, "path": str(run.out)}
