"""SAEs of other libraries: read as those libraries read them, refused in one sentence, written so that they open.

The fixtures come from the libraries themselves (`make sae-formats`, scripts/sae_fixtures).
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from demur.cli.main import main
from demur.errors import DemurError, DownloadError, InputError, MismatchError, NotFoundError
from demur.sae.base import Sae
from demur.sae.formats import detect, saelens, sparsify
from demur.sae.formats.common import hookpoint, hub_name
from demur.sae.groupmax import GroupMaxSae
from demur.sae.meaning import SaeConfig, SaeModel, build
from demur.sae.store import check_fits, load_sae, save_sae, write_reference
from demur.types import parse_hookpoint
from demur.verbs.config import SaeConvert
from demur.verbs.sae_convert import sae_convert

COMMITTED = Path(__file__).parent / "fixtures/saes"
FIXTURES = Path(os.environ.get("DEMUR_SAE_FIXTURES", COMMITTED))
WRITTEN, REOPENED = (Path(os.environ.get(f"DEMUR_SAE_{name}", "none")) for name in ("WRITTEN", "REOPENED"))
VARIANTS = sorted(str(file.parent.relative_to(FIXTURES)) for file in FIXTURES.rglob("expected.safetensors"))
CLOSE = 1e-5


def about(variant: str) -> dict[str, Any]:
    with safe_open(FIXTURES / variant / "expected.safetensors", "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["about"])
    return found


def place(variant: str) -> Path:
    found: Path = FIXTURES / variant / about(variant)["path"]
    return found


def run(sae: Sae, x: Tensor) -> dict[str, Tensor]:
    prepared = sae.prepare(x)
    latents = sae.encode_prepared(prepared.x)
    return {"latents": latents, "reconstruction": prepared.restore(sae.decode(latents))}


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in ours)


@pytest.mark.parametrize("variant", VARIANTS)
def test_we_compute_what_the_library_computes(variant: str) -> None:
    wanted, stated = load_file(FIXTURES / variant / "expected.safetensors"), about(variant)
    loaded = load_sae(place(variant), stated["input_scale"])
    assert apart(run(loaded.sae, wanted["x"]), wanted) < CLOSE
    config = loaded.config
    assert (config.architecture, config.k, config.hookpoint, config.model.name, len(config.notes)) == (
        stated["architecture"], stated["k"], stated["hookpoint"], stated["model"], stated["notes"],
    )  # fmt: skip
    assert config.source.startswith(variant.split("/")[0] + ": ")
    assert (config.model.fingerprint, config.model.n_blocks) == ("", 0)
    # single latents are read as encode gives them
    prepared = loaded.sae.prepare(wanted["x"]).x
    every = torch.ones(len(prepared), 3, dtype=torch.bool)
    latents = [int(i) for i in wanted["latents"].sum(0).topk(3).indices]
    read = loaded.sae.reader(latents)(prepared, every)
    torch.testing.assert_close(read, loaded.sae.encode(wanted["x"])[:, latents], atol=1e-4, rtol=1e-5)


def test_every_format_and_kind_has_a_fixture() -> None:
    stated = [about(variant) for variant in VARIANTS]
    assert {variant.split("/")[0] for variant in VARIANTS} == {form.name for form in (*detect.FORMATS, *detect._FILES)}
    kinds = {"topk", "groupmax", "relu", "jumprelu", "batchtopk", "gated", "matching_pursuit"}
    assert {one["architecture"] for one in stated} == kinds
    assert sum(file.stat().st_size for file in FIXTURES.rglob("*") if file.is_file()) < 400_000


REOPENED_VARIANTS = sorted(REOPENED.rglob("theirs.safetensors")) if REOPENED.is_dir() else []


@pytest.mark.skipif(not REOPENED_VARIANTS, reason="needs the libraries: make sae-formats")
def test_the_libraries_compute_what_we_wrote() -> None:
    far = {}
    for file in REOPENED_VARIANTS:
        library, variant = file.parts[-3:-1]
        ours = load_file(WRITTEN / library / variant / "ours.safetensors")
        far[f"{library} {variant}"] = apart(ours, load_file(file))
    assert not {name: value for name, value in far.items() if not value < CLOSE}
    assert len(far) == len(list(WRITTEN.rglob("ours.safetensors"))) > 40


def copied(variant: str, tmp_path: Path) -> Path:
    """A copy of a fixture that a test may damage; the folder of its SAE."""
    shutil.copytree(FIXTURES / variant, tmp_path / variant)
    stated = (
        about(variant)
        if (FIXTURES / variant / "expected.safetensors").is_file()
        else {"path": "layers.1" * variant.startswith("sparsify")}
    )
    return tmp_path / variant / str(stated["path"])


def edit(file: Path, **change: Any) -> None:
    """Change fields of a JSON file; None takes one out."""
    raw = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def edit_tensors(file: Path, **change: Tensor | None) -> None:
    save_file({k: v.contiguous() for k, v in {**load_file(file), **change}.items() if v is not None}, file)


CFG = "cfg.json"
BAD_CONFIGS: list[tuple[str, str, dict[str, Any], type[DemurError], str]] = [
    ("saelens/topk", CFG, {"d_sae": 31}, MismatchError, r"W_enc is \(10, 30\), but cfg.json asks for \(10, 31\)"),
    ("saelens/topk", CFG, {"d_sae": "many"}, InputError, "d_sae = 'many', expected a positive whole number"),
    ("saelens/topk", CFG, {"k": None}, InputError, "k = None, expected a positive whole number"),
    ("saelens/topk", CFG, {"k": 31}, InputError, "cannot be right: k is 31, expected 1 to d_sae = 30"),
    ("saelens/topk", CFG, {"architecture": "abstopk"}, InputError, "'abstopk'.*latents may be negative"),
    ("saelens/topk", CFG, {"architecture": "temporal"}, InputError, "'temporal'.*earlier tokens"),
    ("saelens/topk", CFG, {"architecture": "new"}, InputError, "'new'.*demur knows standard, topk"),
    ("saelens/topk", CFG, {"normalize_activations": "odd"}, InputError, "normalize_activations = 'odd'; demur knows"),
    ("saelens/refused_transcoder", CFG, {}, InputError, "a transcoder, which does not reconstruct what it reads"),
    ("saelens/flat_standard", CFG, {"activation_fn": "tanh-relu"}, InputError, "'tanh-relu'; demur knows relu"),
    ("saelens/matching_pursuit", CFG, {"stop_on_duplicate_support": False}, InputError, "does not know"),
    ("sparsify/refused_transcode", CFG, {}, InputError, "of a transcoder"),
    ("sparsify/refused_skip", CFG, {}, InputError, "linear skip connection"),
    ("sparsify/topk", CFG, {"signed": True}, InputError, "latents may be negative"),
    ("sparsify/topk", CFG, {"activation": "relu"}, InputError, "activation 'relu'; demur knows topk and groupmax"),
    ("sparsify/topk", CFG, {"num_latents": 0}, MismatchError, r"encoder.weight is \(30, 10\).*\(320, 10\)"),
    ("sparsify/groupmax", CFG, {"k": 7}, InputError, "k is 7, expected a number of groups that divides d_sae = 30"),
    ("sparsify/topk", CFG, {"d_in": None}, InputError, "not a demur SAE.*not one of sparsify"),
    ("llama_scope/unit_norms", "hyperparams.json", {"hook_point_out": "blocks.5.hook_mlp_out"}, InputError,
     "transcoder"),
    ("llama_scope/unit_norms", "hyperparams.json", {"norm_activation": "batch-wise"}, InputError, "'batch-wise'"),
    ("llama_scope/unit_norms", "hyperparams.json", {"act_fn": "topk"}, InputError, "act_fn = 'topk'"),
    ("llama_scope/unit_norms", "hyperparams.json", {"jump_relu_threshold": None}, InputError, "expected a number"),
    ("gemma_scope_2/resid_post", "config.json", {"architecture": "topk"}, InputError, "expected 'jump_relu'"),
    ("gemma_scope_2/resid_post", "config.json", {"hf_hook_point_out": "model.layers.1.output"}, InputError,
     "transcoder"),
    ("dictionary_learning/AutoEncoder", "config.json", {"trainer": {"dict_class": "IdentityDict"}}, InputError,
     "dict_class 'IdentityDict'; demur knows AutoEncoder"),
    ("dictionary_learning/AutoEncoder", "config.json", {"trainer": {"dict_class": "CrossCoder"}}, InputError,
     "of a CrossCoder"),
    ("dictionary_learning/AutoEncoder", "config.json", {"buffer": {"io": "in_and_out"}}, InputError, "transcoder"),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "file", "change", "error", "sentence"), BAD_CONFIGS)
def test_a_config_that_cannot_be_right_is_one_sentence(
    variant: str, file: str, change: dict[str, Any], error: type[DemurError], sentence: str, tmp_path: Path
) -> None:
    folder = copied(variant, tmp_path)
    edit(folder / file, **change)
    with pytest.raises(error, match=sentence) as raised:
        load_sae(folder)
    assert "\n" not in str(raised.value)


ONE_NAN = torch.full((30,), torch.nan)
BAD_TENSORS: list[tuple[str, str, dict[str, Tensor | None], type[DemurError], str]] = [
    ("saelens/topk", "sae_weights.safetensors", {"b_enc": ONE_NAN}, InputError, "b_enc holds NaN"),
    ("saelens/jumprelu", "sae_weights.safetensors", {"threshold": ONE_NAN}, InputError, "threshold holds NaN"),
    ("saelens/topk", "sae_weights.safetensors", {"W_dec": torch.zeros(30, 10, dtype=torch.int8)}, InputError,
     "W_dec holds int8, expected floating-point numbers"),
    ("saelens/topk", "sae_weights.safetensors", {"b_dec": None}, MismatchError, "b_dec is missing"),
    ("saelens/flat_standard", "sae_weights.safetensors", {"scaling_factor": torch.full((30,), 2.0)}, InputError,
     "nobody can tell whether it is meant"),
    ("sparsify/topk", "sae.safetensors", {"W_dec": torch.zeros(10, 30)}, MismatchError, r"W_dec is \(10, 30\)"),
    ("gemma_scope_2/resid_post", "params.safetensors", {"w_enc": torch.zeros(30, 10)}, MismatchError, "w_enc is"),
    ("gemma_scope_2/resid_post", "params.safetensors", {"affine_skip_connection": torch.zeros(10, 10)}, InputError,
     "transcoder"),
    ("gemma_scope_2/resid_post", "params.safetensors", {"b_dec": None}, MismatchError, "b_dec is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "file", "change", "error", "sentence"), BAD_TENSORS)
def test_tensors_that_cannot_be_right_are_one_sentence(
    variant: str, file: str, change: dict[str, Tensor | None], error: type[DemurError], sentence: str, tmp_path: Path
) -> None:
    folder = copied(variant, tmp_path)
    edit_tensors(folder / file, **change)
    with pytest.raises(error, match=sentence):
        load_sae(folder)


@pytest.mark.parametrize(
    ("variant", "file", "kind"),
    [
        ("saelens/topk", "sae_weights.safetensors", "safetensors"),
        ("dictionary_learning/AutoEncoder", "ae.pt", "torch"),
        ("gemma_scope/residual", "params.npz", "numpy"),
    ],
)
def test_a_short_file_is_one_sentence(variant: str, file: str, kind: str, tmp_path: Path) -> None:
    folder = copied(variant, tmp_path)
    whole = (folder / file).read_bytes()
    for size in (len(whole) - 300, 300, 3, 0):
        (folder / file).write_bytes(whole[:size])
        with pytest.raises(InputError, match=f"is not a whole {kind} file|is damaged") as raised:
            load_sae(folder)
        assert "\n" not in str(raised.value)


class Evil:
    """Unpickling it would create the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("name", ["ae.pt", "layer3.sae.pt", "sae.pth", "sae.bin", "params.npz"])
def test_nothing_is_ever_unpickled(name: str, tmp_path: Path) -> None:
    made, file = tmp_path / "made", tmp_path / name
    if name.endswith(".npz"):
        np.savez(file, W_enc=np.array([Evil(made)], dtype=object))
    else:
        torch.save({"W_enc": Evil(made)}, file)
    with pytest.raises(InputError, match=r"run code when opened|is not a whole numpy file"):
        load_sae(file)
    file.write_bytes(pickle.dumps({"W_enc": Evil(made)}))
    with pytest.raises(InputError, match=r"run code when opened|is not a whole numpy file"):
        load_sae(file)
    assert not made.exists()


def test_folders_and_files_without_an_sae(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no SAE is at '/nowhere/at/all'.*owner/repo/path.*smollm2"):
        load_sae("/nowhere/at/all")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds notes.txt, which is no SAE that demur knows; expected .* saelens"):
        load_sae(tmp_path)
    with pytest.raises(InputError, match=r"notes.txt is no file of tensors"):
        load_sae(tmp_path / "notes.txt")
    with pytest.raises(InputError, match=r"holds \d+ SAEs; add one of these to the path: .*average_norm"):
        load_sae(FIXTURES / "saelens")
    # the only one below is meant
    shutil.copytree(FIXTURES / "saelens/topk", tmp_path / "run/final")
    assert load_sae(tmp_path).config.architecture == "topk"
    assert load_sae(tmp_path / "run/final/sae_weights.safetensors").hash == load_sae(tmp_path).hash


def test_lone_files_that_do_not_say_enough(tmp_path: Path) -> None:
    source = place("state_dict/qwen_scope")
    shutil.copy(source, tmp_path / "layer12.sae.pt")
    with pytest.raises(InputError, match="does not say how many latents are active"):
        load_sae(tmp_path / "layer12.sae.pt")
    shutil.copy(place("state_dict/nanda"), tmp_path / "25.pt")
    with pytest.raises(InputError, match="nothing says whether b_dec is subtracted"):
        load_sae(tmp_path / "25.pt")
    save_file({"weight": torch.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match="holds weight, which is no SAE that demur knows from its tensors alone"):
        load_sae(tmp_path / "odd.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="holds a list, expected a dictionary of tensors"):
        load_sae(tmp_path / "list.pt")
    for name in ("AutoEncoder", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder", "AutoEncoderTopK"):
        shutil.copy(FIXTURES / f"dictionary_learning/{name}/ae.pt", tmp_path / "ae.pt")
        if name == "AutoEncoderTopK":
            with pytest.raises(InputError, match=r"does not say which class of SAE it is without its config.json"):
                load_sae(tmp_path / "ae.pt")
            continue
        loaded = load_sae(tmp_path / "ae.pt")
        wanted = load_file(FIXTURES / f"dictionary_learning/{name}/expected.safetensors")
        assert apart(run(loaded.sae, wanted["x"]), wanted) < CLOSE
        assert loaded.config.hookpoint == ""
        assert len(loaded.config.notes) == 1


def test_gemma_scope_2_transcoders_are_refused_by_name(tmp_path: Path) -> None:
    source = place("gemma_scope_2/resid_post")
    for name, kind in (("transcoder", "transcoder"), ("clt", "cross-layer transcoder")):
        folder = tmp_path / name / "layer_5_width_16k_l0_big"
        shutil.copytree(source, folder)
        (folder / "config.json").unlink()
        with pytest.raises(InputError, match=f"of a {kind}, which"):
            load_sae(folder)
    file = tmp_path / "clt/width_262k_l0_big/params_layer_3.safetensors"
    file.parent.mkdir()
    save_file({**load_file(source / "params.safetensors"), "w_dec": torch.zeros(30, 3, 10)}, file)
    with pytest.raises(InputError, match="of a cross-layer transcoder, which"):
        load_sae(file)


def test_what_the_path_says(tmp_path: Path) -> None:
    source = place("gemma_scope/residual")
    shutil.copytree(source, tmp_path / "layer_20/width_16k/average_l0_71")
    loaded = load_sae(tmp_path / "layer_20")
    assert (loaded.config.hookpoint, loaded.config.model.name) == ("layers.20.resid_post", "")
    assert "taken to read the output of the block" in loaded.config.notes[0]
    shutil.copytree(source, tmp_path / "mine")
    assert load_sae(tmp_path / "mine").config.hookpoint == ""
    shutil.copytree(place("sparsify/topk"), tmp_path / "my-sae")
    loaded = load_sae(tmp_path / "my-sae")
    assert loaded.config.hookpoint == ""
    assert "Name its folder by the module" in loaded.config.notes[0]


def test_input_scales() -> None:
    unknown, known = place("saelens/average_norm_unknown"), place("saelens/topk")
    assert "leave out" in load_sae(unknown).config.notes[0]
    assert load_sae(unknown, 0.5).config.notes == ()
    assert len({load_sae(unknown).hash, load_sae(unknown, 0.5).hash, load_sae(unknown, 0.6).hash}) == 3
    for scale in (0.0, -1.0, float("inf")):
        with pytest.raises(InputError, match="expected a positive number"):
            load_sae(unknown, scale)
    for path in (known, place("sparsify/topk"), place("gemma_scope/residual"), place("gemma_scope_2/resid_post"),
                 place("llama_scope/unit_norms"), place("dictionary_learning/BatchTopKSAE"),
                 place("state_dict/goodfire"), "smollm2-135m-instruct"):  # fmt: skip
        with pytest.raises(InputError, match=r"an input scale was given, but .*; leave (the scale|it) out"):
            load_sae(path, 0.5)


def test_where_saelens_misreads_a_sparsify_file_we_do_not() -> None:
    """num_latents 0, W_dec as stored, b_dec always subtracted: SAELens 6.54 takes 0, transposes, and does not."""
    loaded = load_sae(place("sparsify/topk_num_latents_0"))
    stored = load_file(place("sparsify/topk_num_latents_0") / "sae.safetensors")
    assert json.loads((place("sparsify/topk_num_latents_0") / CFG).read_text())["num_latents"] == 0
    assert loaded.config.d_sae == 30
    assert torch.equal(loaded.sae.W_dec, stored["W_dec"])
    assert loaded.sae.subtract_b_dec


def test_the_hash_is_of_the_files_and_not_of_the_place(tmp_path: Path) -> None:
    folder = copied("saelens/topk", tmp_path)
    before = load_sae(folder).hash
    assert before == load_sae(place("saelens/topk")).hash
    edit_tensors(folder / "sae_weights.safetensors", b_dec=torch.zeros(10))
    assert load_sae(folder).hash != before


def test_a_foreign_sae_fits_a_model_of_its_width_with_its_block(tmp_path: Path) -> None:
    loaded = load_sae(place("sparsify/topk"))
    check_fits(loaded, "any/model", "f" * 16, 10, 7)
    with pytest.raises(MismatchError, match=r"reads layers.6.resid_post, but any/model has 6 blocks"):
        check_fits(loaded, "any/model", "f" * 16, 10, 6)
    with pytest.raises(MismatchError, match=r"is for a model of width 10, but any/model has width 12 and 7 blocks"):
        check_fits(loaded, "any/model", "f" * 16, 12, 7)
    with pytest.raises(InputError, match="demur sae convert SAE OUT --to demur"):
        write_reference(place("sparsify/topk"), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("blocks.12.hook_resid_post", "layers.12.resid_post"),
        ("model.layers.3.output", "layers.3.resid_post"),
        ("model.language_model.layers.3", "layers.3.resid_post"),
        ("transformer.h.3", "layers.3.resid_post"),
        ("blocks.4.hook_resid_pre", "layers.3.resid_post"),
        ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_pre"),
        ("layers.3.mlp", "layers.3.mlp"),
        ("blocks.4.attn.hook_z", "blocks.4.attn.hook_z"),
    ],
)
def test_hookpoints(text: str, found: str) -> None:
    assert hookpoint(text) == found
    if found.endswith("resid_post"):
        assert str(parse_hookpoint(text)) == found
    else:
        with pytest.raises(InputError):
            parse_hookpoint(found)


def test_model_names() -> None:
    names = ("gpt2-small", "pythia-70m", "gemma-2-2b", "google/gemma-2-2b", "unknown")
    found = ("openai-community/gpt2", "EleutherAI/pythia-70m", "google/gemma-2-2b", "google/gemma-2-2b", "unknown")
    assert tuple(map(hub_name, names)) == found


class Hub:
    """The hub, answered from a folder."""

    def __init__(self, root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.cache, self.asked = root, cache, [""]
        monkeypatch.setattr(huggingface_hub, "model_info", self.info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def names(self) -> list[str]:
        return [file.relative_to(self.root).as_posix() for file in self.root.rglob("*") if file.is_file()]

    def info(self, repo: str, revision: str | None = None, timeout: float = 0) -> Any:
        self.asked = [repo, revision or ""]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names()])

    def download(
        self, repo: str, revision: str | None = None, allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:  # fmt: skip
        if local_files_only and not self.cache.exists():
            raise hub_errors.LocalEntryNotFoundError("nothing is kept")
        for name in self.names():
            if any(fnmatch(name, pattern) for pattern in allow_patterns or []):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.root / name, self.cache / name)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(FIXTURES, tmp_path / "cache", monkeypatch)


def test_a_hub_reference_fetches_that_sae_only(hub: Hub) -> None:
    loaded = load_sae("owner/repo@v1/saelens/gated_checkpoint_whitened")
    assert hub.asked == ["owner/repo", "v1"]
    assert loaded.hash == load_sae(place("saelens/gated_checkpoint_whitened")).hash
    assert loaded.config.source == "saelens: owner/repo@v1/saelens/gated_checkpoint_whitened"
    fetched = sorted(file.name for file in hub.cache.rglob("*") if file.is_file())
    assert fetched == ["activation_scaler.json", "activation_whitening.safetensors", CFG, "sae_weights.safetensors"]
    # the config of the run, above it, and a file in a folder of its own
    loaded = load_sae("owner/repo/sparsify/topk_num_latents_0/run/h.3/")
    assert (loaded.config.model.name, loaded.config.hookpoint) == ("openai-community/gpt2", "layers.3.resid_post")
    name = place("state_dict/qwen_scope").relative_to(FIXTURES).as_posix()
    assert load_sae(f"owner/repo/{name}").config.k == 5
    assert load_sae(f"owner/repo/{place('gemma_scope/mlp').relative_to(FIXTURES)}").config.model.name != ""


def test_the_repositorys_name_tells_what_its_files_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    hub.root = FIXTURES / "gemma_scope/mlp/google/gemma-scope-2b-pt-mlp"
    loaded = load_sae("google/gemma-scope-2b-pt-mlp/layer_3")
    assert (loaded.config.hookpoint, loaded.config.model.name) == ("blocks.3.hook_mlp_out", "google/gemma-2-2b")
    hub.root, hub.cache = place("state_dict/qwen_scope").parent, tmp_path / "other"
    assert load_sae("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5").config.k == 5


def test_demurs_own_saes_come_from_the_hub_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae_convert(SaeConvert(str(place("saelens/topk")), tmp_path / "own/a", "demur"))
    Hub(tmp_path / "own", tmp_path / "cache", monkeypatch)
    assert load_sae("owner/repo").hash == load_sae(tmp_path / "own/a").hash


def test_hub_references_that_mean_no_sae(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"repository owner/repo holds \d+ SAEs; add one of these to the path: dict"):
        load_sae("owner/repo")
    with pytest.raises(NotFoundError, match=r"repository owner/repo at layers\.3 holds nothing"):
        load_sae("owner/repo/layers.3")


def answer(status: int) -> Any:
    return SimpleNamespace(headers={}, request=None, status_code=status)


@pytest.mark.parametrize(
    ("error", "expected", "sentence"),
    [
        (ConnectionError("no route"), DownloadError, r"owner/repo could not be reached \(no route\)"),
        (hub_errors.OfflineModeIsEnabled("offline"), DownloadError, "could not be reached"),
        (hub_errors.RepositoryNotFoundError("x", response=answer(404)), NotFoundError, "no such reposit"),
        (hub_errors.RevisionNotFoundError("x", response=answer(404)), NotFoundError, "no revision 'v9'"),
        (hub_errors.GatedRepoError("x", response=answer(403)), NotFoundError, "is gated; accept its terms"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_sentence(
    error: Exception, expected: type[DemurError], sentence: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    with pytest.raises(expected, match=sentence) as raised:
        load_sae("owner/repo@v9/saelens/topk")
    assert "\n" not in str(raised.value)
    if isinstance(error, ConnectionError) and expected is DownloadError:
        # what was fetched before is found without a network
        shutil.copytree(FIXTURES / "saelens/topk", hub.cache / "saelens/topk")
        assert load_sae("owner/repo/saelens/topk").config.k == 5


def test_a_gated_file_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise hub_errors.GatedRepoError("x", response=answer(403))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(NotFoundError, match="is gated"):
        load_sae("owner/repo/saelens/topk")


def random_sae(kind: str, seed: int, **more: Any) -> tuple[Sae, SaeConfig]:
    k = {"topk": 4, "groupmax": 6, "matching_pursuit": 5}.get(kind, 0)
    config = SaeConfig(12, 36, k, "layers.2.resid_post", SaeModel("some/model", "", 0), kind, **more)
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (12, 36), "b_enc": (36,), "W_dec": (36, 12), "b_dec": (12,), "b_mag": (36,), "r_mag": (36,)}
    weights = {name: torch.randn(shape, generator=g) * 0.4 for name, shape in shapes.items()}
    weights["threshold"] = torch.rand(36, generator=g) if kind not in ("relu",) else torch.zeros(36)
    if kind == "matching_pursuit":
        weights |= {"residual_threshold": torch.tensor(0.5), "b_enc": torch.zeros(36), "W_enc": weights["W_dec"].T}
        weights["b_dec"] *= config.subtract_b_dec
    return build(config, weights, "random", "config"), config


KINDS = ("topk", "groupmax", "relu", "jumprelu", "batchtopk", "gated", "matching_pursuit")


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(("none", "layer_norm", "constant_norm")),
    st.booleans(),
    st.integers(0, 10_000),
    st.sampled_from(("demur", "saelens", "sparsify")),
)
def test_what_is_written_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, kind: str, normalize: Any, subtract: bool, seed: int, to: str
) -> None:
    sae, config = random_sae(kind, seed, normalize=normalize, subtract_b_dec=subtract)
    folder = tmp_path_factory.mktemp("sae")
    save_sae(folder / "sae", sae, config)
    convert = SaeConvert(str(folder / "sae"), folder / "layers.2", to)  # type: ignore[arg-type]
    cannot = {
        "sparsify": kind not in ("topk", "groupmax") or normalize != "none",
        "saelens": kind == "groupmax",
        "demur": False,
    }
    if cannot[to]:
        with pytest.raises(InputError, match=r"--to (saelens|demur)"):
            sae_convert(convert)
        assert not (folder / "layers.2").exists()
        return
    converted = sae_convert(convert)
    assert converted.difference < CLOSE
    again = load_sae(folder / "layers.2")
    assert again.config.hookpoint == "layers.2.resid_post"
    assert again.sae.normalize == normalize
    x = sae.b_dec + 2 * torch.randn(16, 12, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(again.sae.reconstruct(x), sae.reconstruct(x), atol=1e-4, rtol=1e-4)


def test_a_conversion_that_changes_something_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(folder: Path, sae: Sae, config: SaeConfig) -> tuple[str, ...]:
        with torch.no_grad():
            sae.W_dec[0] *= -1
        lost = real(folder, sae, config)
        with torch.no_grad():
            sae.W_dec[0] *= -1
        return lost

    real = saelens.write
    monkeypatch.setattr(saelens, "write", wrong)
    for there in (False, True):
        out = tmp_path / str(there)
        if there:
            out.mkdir()
        with pytest.raises(InputError, match="so it was removed"):
            sae_convert(SaeConvert(str(place("saelens/standard")), out, "saelens"))
        assert out.exists() is there
        assert not there or not list(out.iterdir())


def test_convert_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(place("saelens/topk_ranked_by_norm"))
    assert main(["sae", "convert", source, str(tmp_path / "layers.4"), "--to", "sparsify", "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["difference"] < CLOSE
    assert (result["to"], result["hookpoint"], result["notes"]) == ("sparsify", "layers.4.resid_post", [])
    assert result["hash"] == load_sae(tmp_path / "layers.4").hash
    assert "read back, it differs by" in said.err
    assert main(["sae", "convert", source, str(tmp_path / "layers.4"), "--to", "demur"]) == 1
    assert "is not empty" in capsys.readouterr().err
    unknown = str(place("saelens/average_norm_unknown"))
    assert main(["sae", "convert", unknown, str(tmp_path / "b"), "--to", "demur", "--input-scale", "0.5"]) == 0
    assert load_sae(tmp_path / "b").config.source == f"saelens: {unknown}"
    assert load_sae(tmp_path / "b").config.notes == ()


def test_what_a_writer_cannot_keep(tmp_path: Path) -> None:
    sae = load_sae("smollm2-135m-instruct")
    assert "reference statistics" in saelens.write(tmp_path / "a", sae.sae, sae.config)[0]
    assert "folder's name" in sparsify.write(tmp_path / "b", sae.sae, sae.config)[1]
    pursuit, config = random_sae("matching_pursuit", 0)
    pursuit.W_enc.data *= 2
    with pytest.raises(InputError, match="SAELens takes the encoder of a matching-pursuit SAE from its decoder"):
        saelens.write(tmp_path / "c", pursuit, config)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(("groupmax", "matching_pursuit", "gated")), st.integers(0, 1000), st.booleans())
def test_single_latents_of_every_kind_are_read_exactly(kind: str, seed: int, subtract: bool) -> None:
    sae, _ = random_sae(kind, seed, subtract_b_dec=subtract)
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(seed)) * 3
    dense = sae.encode(x)
    latents = [35, 0, 7, 6]
    flat = sae.prepare(x.flatten(0, -2)).x
    read = sae.reader(latents)(flat, torch.ones(18, 4, dtype=torch.bool)).view(2, 9, 4)
    torch.testing.assert_close(read, dense[..., latents], atol=1e-5, rtol=1e-4)


def test_groupmax_has_one_latent_a_group() -> None:
    sae, _ = random_sae("groupmax", 1)
    assert isinstance(sae, GroupMaxSae)
    dense = sae.encode(torch.randn(20, 12) * 3).unflatten(-1, (6, 6))
    assert int((dense > 0).sum(-1).max()) == 1
    p = sae.preactivations(torch.zeros(1, 12)).unflatten(-1, (6, 6))
    torch.testing.assert_close(sae.encode(torch.zeros(1, 12)).unflatten(-1, (6, 6)).amax(-1), p.amax(-1).relu())
