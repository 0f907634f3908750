"""The walk, transformers and the engine on one model: where all agree, and where something is wrong, at its layer."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny_families
import tiny_models
from bitladder.cli.app import app
from bitladder.errors import BadInput, NothingFits, UnknownArchitecture
from bitladder.files import engine_package, probe
from bitladder.files.convert import ORIGIN
from bitladder.plan.selfcheck import Bound, bound_of, comparison, layer_gap, trust
from bitladder.records.selfcheck import HEAD, ComparedPair, ComparedSide, Implementation, SelfCheck, Trust
from bitladder.stages.job import Work, opened
from bitladder.stages.selfcheck import _Check, selfcheck_model
from bitladder.walk.layers import LayeredModel
from engine_models import write_family

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("one_thread")]
WALK, TRANSFORMERS, ENGINE = Implementation.WALK, Implementation.TRANSFORMERS, Implementation.ENGINE


def file_and_checkpoint(name: str, folder: Path, dtype: type = np.float32) -> Path:
    """A tiny model with its checkpoint beside it, as after a conversion."""
    case = tiny_models.CASES[name]
    model = tiny_models.make(case)
    (folder / "converted").mkdir(parents=True)
    model.save_pretrained(folder / "checkpoint")
    (folder / "converted" / ORIGIN).write_text(str((folder / "checkpoint").resolve()))
    return tiny_models.write(case, model, folder / "converted" / "model.gguf", dtype, tokenizer=tiny_models.with_merges)


def checked(path: Path) -> SelfCheck:
    return selfcheck_model(str(path), Work())


def pairs(check: SelfCheck) -> dict[tuple[Implementation, Implementation], ComparedPair]:
    return {(made.one, made.other): made for made in check.comparisons}


def trusted(check: SelfCheck) -> dict[str, Trust]:
    return {part.what: part.trust for part in check.trust}


# ---- agreement


@pytest.mark.parametrize(("name", "dtype"), [("llama", np.float32), ("qwen3moe", np.float32), ("qwen2", np.float16)])
def test_tabled_rows_transformers_and_engine_agree(name, dtype, tmp_path):
    check = checked(file_and_checkpoint(name, tmp_path, dtype))
    assert check.agrees
    assert set(pairs(check)) == {(WALK, ENGINE), (WALK, TRANSFORMERS)}
    for made in check.comparisons:
        assert [gap.layer for gap in made.layers] == [*range(check.n_layer), HEAD]
        assert made.first is None
        assert not any(gap.parts for gap in made.layers)
    assert set(trusted(check).values()) == {Trust.YES}
    assert set(trusted(check)) == {"conversion", "fidelity", "importance", "calibration", "recipes", "workload"}


_YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> dict[bool, Path]:
    """Converted by llama.cpp's own converter; no row describes its layers. Where YaRN's ramp begins is rounded to whole
    dimensions, or not, as in the release."""
    base = tiny_families.FAMILIES["gpt-oss"]
    with pytest.MonkeyPatch.context() as patch:
        for whole in (True, False):
            rope = {"rope_parameters": {**_YARN, "truncate": whole}}
            patch.setitem(tiny_families.FAMILIES, f"gpt-oss {whole}", replace(base, fields={**base.fields, **rope}))
        made = tiny_families.write_all(tmp_path_factory.mktemp("families"), ["gpt-oss True", "gpt-oss False"])
    return {whole: made[f"gpt-oss {whole}"][2] for whole in (True, False)}


def test_layers_found_over_a_checkpoint_agree(gpt_oss):
    check = checked(gpt_oss[True])
    assert check.agrees
    assert set(pairs(check)) == {(WALK, ENGINE), (WALK, TRANSFORMERS)}
    walk = next(one for one in check.compared if one.name is WALK)
    assert "found over the checkpoint" in walk.how


def test_rounding_of_quantized_files_is_no_fault(tmp_path, monkeypatch):
    """Q8 inputs in the engine, a file alone, real text; the JSON is the record, the exit code 0."""
    from bitladder.files.gguf import GgufFile
    from bitladder.stages.write_levels import quantize_levels
    from tiny_engine import write_tiny

    with GgufFile.open(write_tiny(tmp_path / "tiny.gguf")) as source:
        path = quantize_levels(source, ["Q4_K_M"], tmp_path / "out", threads=1)[0].path
    found = CliRunner().invoke(app, ["selfcheck", str(path), "--json"])
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert record["agrees"] is True
    assert record["text"] == "the text that ships for measuring"
    made = {(one["one"], one["other"]): one for one in record["comparisons"]}
    assert set(made) == {("walk", "engine"), ("walk", "transformers")}
    engine, own = (made["walk", other]["layers"] for other in ("engine", "transformers"))
    assert min(gap["bound"] for gap in engine[:-1]) > 50 * max(gap["bound"] for gap in own)  # it does round
    assert {part["trust"] for part in record["trust"]} == {"yes"}
    assert "conversion" not in {part["what"] for part in record["trust"]}


# ---- something is wrong


def test_a_wrong_row_is_found_at_its_layer(tmp_path, monkeypatch):
    """Queries of one layer are not turned back into the order of transformers; the two others show who is wrong."""
    kind = LayeredModel.kind

    def wrong(self, layer):
        row = kind(self, layer)
        if layer != 1:
            return row
        changed = [
            replace(one, transform="same") if one.path == "self_attn.q_proj.weight" else one for one in row.parameters
        ]
        assert changed != list(row.parameters)
        return replace(row, parameters=tuple(changed))

    monkeypatch.setattr(LayeredModel, "kind", wrong)
    check = checked(file_and_checkpoint("llama", tmp_path))
    made = pairs(check)
    assert not check.agrees
    for other in (ENGINE, TRANSFORMERS):
        assert made[WALK, other].first == 1
        assert [gap.layer for gap in made[WALK, other].layers if gap.parts] == [1]
    assert made[TRANSFORMERS, ENGINE].agrees
    assert trusted(check) == {
        "conversion": Trust.YES, "fidelity": Trust.NO, "importance": Trust.NO, "calibration": Trust.NO,
        "recipes": Trust.NO, "workload": Trust.YES,
    }  # fmt: skip
    why = next(part.why for part in check.trust if part.what == "fidelity")
    assert why == "the walk parts from the engine at layer 1 and transformers at layer 1"


@pytest.mark.parametrize(
    ("tensor", "layer"), [("blk.2.ffn_down.weight", 2), ("blk.1.attn_norm.weight", 1), ("token_embd.weight", 0)]
)
def test_a_changed_file_is_found_at_its_layer(tensor, layer, tmp_path):
    path = file_and_checkpoint("llama", tmp_path)
    change(path, tensor)
    check = checked(path)
    made = pairs(check)
    assert made[WALK, ENGINE].agrees
    assert made[WALK, TRANSFORMERS].first == layer
    assert trusted(check)["conversion"] is Trust.NO
    assert trusted(check)["calibration"] is Trust.NO
    assert trusted(check)["fidelity"] is Trust.YES
    assert trusted(check)["workload"] is Trust.YES
    found = CliRunner().invoke(app, ["selfcheck", str(path)])
    assert found.exit_code == 4
    assert f"part at layer {layer} first" in found.stdout


def change(path: Path, tensor: str) -> None:
    """A tenth more, in every other element."""
    import gguf

    reader = gguf.GGUFReader(path, "r+")
    data = next(one for one in reader.tensors if one.name == tensor).data
    data.reshape(-1)[::2] *= 1.1
    data.flush()


def test_what_the_engine_does_differently(gpt_oss):
    """llama.cpp rounds where YaRN's ramp begins to whole dimensions, whatever the release says: no bound hides that."""
    check = checked(gpt_oss[False])
    made = pairs(check)
    assert made[WALK, TRANSFORMERS].agrees
    assert made[WALK, ENGINE].first == made[TRANSFORMERS, ENGINE].first == 0
    assert trusted(check)["workload"] is Trust.NO
    assert trusted(check)["calibration"] is Trust.YES


def test_a_changed_file_whose_layers_are_found(gpt_oss, tmp_path):
    """The walk refuses it there; transformers and the engine show where."""
    shutil.copytree(gpt_oss[True].parents[1], tmp_path / "copy")
    path = tmp_path / "copy" / "converted" / "model.gguf"
    (path.parent / ORIGIN).write_text(str((tmp_path / "copy" / "checkpoint").resolve()))
    change(path, "blk.2.attn_v.weight")
    check = checked(path)
    made = pairs(check)[TRANSFORMERS, ENGINE]
    assert made.first == 2
    assert [gap.layer for gap in made.layers if gap.parts] == [2]
    assert trusted(check)["conversion"] is Trust.NO
    assert trusted(check)["calibration"] is Trust.NO


# ---- what cannot be compared


def test_one_implementation_alone_is_refused_with_reasons(tmp_path):
    path = write_family(tmp_path / "tiny.gguf", "deepseek2")
    with pytest.raises(UnknownArchitecture, match=r"nothing to compare for 'deepseek2': only engine") as error:
        checked(path)
    assert "transformers: " in error.value.means
    assert "walk: " in error.value.means
    assert CliRunner().invoke(app, ["selfcheck", str(path)]).exit_code == 2


def test_without_the_engine_the_others_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_package, "engine_version", lambda: "2031.1.20000")
    check = checked(file_and_checkpoint("qwen3", tmp_path))
    assert set(pairs(check)) == {(WALK, TRANSFORMERS)}
    assert check.agrees
    assert trusted(check)["workload"] is Trust.NO
    assert "2031.1.20000" in next(part.why for part in check.trust if part.what == "workload")


def test_what_does_not_fit_takes_no_part(tmp_path, monkeypatch):
    """Whoever needs most is left out where there is too little by a byte; without room for two nothing is begun."""
    path = file_and_checkpoint("llama", tmp_path)
    here = probe.probe_machine()
    with opened(str(path), Work()) as job:
        needs = {name: need.ram_bytes for name, need in _Check(job, 64)._needs().items()}
        assert set(needs) == set(Implementation)
        most = max(needs, key=lambda name: needs[name])
        monkeypatch.setattr(probe, "probe_machine", lambda *_: replace(here, ram_available=needs[most] - 1))
        short = _Check(job, 64)
        assert set(short._needs()) == set(Implementation) - {most}
        assert "of memory" in short.missing[most]
    monkeypatch.setattr(probe, "probe_machine", lambda *_: replace(here, ram_available=100 << 20))
    with pytest.raises(NothingFits, match=r"too little memory to compare anything") as error:
        checked(path)
    assert error.value.means.count("of memory, 100 MiB are free") == 3


def test_more_tokens_than_the_model_was_trained_for(tmp_path):
    path = file_and_checkpoint("llama", tmp_path)
    with pytest.raises(BadInput, match=r"Windows of 129 tokens .* trained for 128"):
        selfcheck_model(str(path), Work(), tokens=129)


# ---- bounds and verdicts


def test_bounds_follow_what_was_measured():
    """Twice the rounding and a little more is allowed to few tokens; what is not finite never."""
    bound = bound_of(WALK, ENGINE, routed=False, weight_share=0.0)
    ones = np.ones(100)
    inside = layer_gap(3, 0.019 * ones, 0.01 * ones, ones, ones, bound)
    assert (inside.parts, inside.outside) == (False, 0.0)
    assert inside.bound == pytest.approx(0.022, rel=0.01)
    assert layer_gap(3, 0.03 * ones, 0.01 * ones, ones, ones, bound).parts
    one = np.where(np.arange(100) == 7, np.nan, 0.0)
    assert not layer_gap(3, one, ones, ones, ones, bound).parts
    assert layer_gap(3, np.full(100, np.nan), ones, ones, ones, bound).parts
    exact = bound_of(WALK, TRANSFORMERS, routed=False, weight_share=0.0)
    assert layer_gap(3, 0.001 * ones, 0 * ones, ones, ones, exact).parts
    assert not layer_gap(3, 0.001 * ones, 0 * ones, ones, 1000 * ones, exact).parts  # lost in 32-bit sums
    rounded = bound_of(WALK, TRANSFORMERS, routed=False, weight_share=0.002)
    assert not layer_gap(3, 0.001 * ones, 0 * ones, ones, ones, rounded).parts
    assert isinstance(rounded, Bound)


def made_of(one, other, *, first=None, layers=4, kl=0.0, kl_rounding=0.0) -> ComparedPair:
    bound = bound_of(one, other, routed=False, weight_share=0.0)
    gaps = [
        layer_gap(at, np.full(9, 1.0 if at == first else 0.0), np.zeros(9), np.ones(9), np.ones(9), bound)
        for at in [*range(layers), HEAD][: layers + 1 if layers else 0]
    ]
    return comparison(one, other, gaps, bound, kl_mean=kl, kl_rounding=kl_rounding, top1=1.0, unseen="not seen")


def verdicts(comparisons, missing=(), *, from_checkpoint=True):
    compared = [ComparedSide(name, "", "not there" if name in missing else "") for name in Implementation]
    found = trust(compared, comparisons, measured_by=WALK, from_checkpoint=from_checkpoint)
    return {part.what: (part.trust, part.why) for part in found}


def test_of_two_that_part_neither_is_trusted():
    found = verdicts([made_of(WALK, ENGINE, first=HEAD)], [TRANSFORMERS], from_checkpoint=False)
    for what in ("fidelity", "calibration", "workload"):
        assert found[what][0] is Trust.NO
        assert found[what][1].endswith("which of them is wrong is not known")
    assert "at the norm or the head" in found["fidelity"][1]


def test_the_reader_of_files_in_transformers_decides_nothing():
    """Where it alone parts, and reads the file itself, nothing here rests on it; where it reads the checkpoint, what
    runs in its layers does."""
    odd = [made_of(WALK, ENGINE), made_of(WALK, TRANSFORMERS, first=0), made_of(TRANSFORMERS, ENGINE, first=0)]
    assert {one for one, _ in verdicts(odd, from_checkpoint=False).values()} == {Trust.YES}
    found = verdicts(odd)
    assert found["conversion"][0] is Trust.NO
    assert found["calibration"][0] is Trust.NO
    assert found["fidelity"][0] is Trust.YES


def test_predictions_decide_where_no_layer_is_seen():
    assert made_of(TRANSFORMERS, ENGINE, layers=0, kl=0.008, kl_rounding=0.001).agrees
    assert not made_of(TRANSFORMERS, ENGINE, layers=0, kl=0.08, kl_rounding=0.001).agrees
    assert not made_of(TRANSFORMERS, ENGINE, layers=0, kl=float("nan"), kl_rounding=0.001).agrees
