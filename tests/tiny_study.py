"""A whole study small enough to run in a second: a random model, a random SAE, a few prompts, as files."""

import json
from pathlib import Path

from demur.lm.load import LanguageModel
from demur.sae.store import SaeConfig, SaeModel, save_sae
from demur.testing import tiny_model, tiny_sae

STUDY = """
model = "model"
sae = "sae"
system = "Be safe."
values = [0, 4, 8]
screen_prompts = 2
shortlist = 4
proposals = 2
finalists = 2
select_prompts = 3
test_harmful = 5
test_plain = 4
test_lookalike = 3
test_questions = 4
max_new_tokens = 4
batch_size = 3
screen_tokens = 3
"""


def write_tiny_study(folder: Path, model_type: str = "llama", extra: str = "") -> Path:
    """Write model, SAE and study file into `folder`; returns the study file."""
    lm = tiny_model(model_type)
    save_model(lm, folder / "model")
    made_for = SaeModel(lm.name, lm.fingerprint, lm.n_blocks)
    save_sae(folder / "sae", tiny_sae(), SaeConfig(32, 96, 8, "layers.1.resid_post", made_for))
    path = folder / "tiny.toml"
    path.write_text(STUDY + extra)
    return path


def save_model(lm: LanguageModel, folder: Path) -> None:
    """An ordinary Hugging Face model folder."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def numbers(folder: Path) -> object:
    """The result of a run without what differs from run to run: times and paths."""
    result = json.loads((folder / "study.json").read_text())
    return {k: v for k, v in result.items() if k not in ("seconds", "step_seconds", "report")}
