"""llama.cpp's MXFP4_MOE, made of a mixture in 16 bits: experts in MXFP4, the rest in Q8_0, and the engine runs it."""

from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny_models
from bitladder.cli.app import app
from bitladder.describe.windows import Window
from bitladder.files.gguf import GgufFile
from bitladder.formats.recipes import is_quantizable
from bitladder.levels import parse_level
from bitladder.plan.cost import level_size
from bitladder.stages.engine_scores import engine_scores
from bitladder.stages.fidelity import file_candidate, token_scores
from bitladder.stages.inspect import inspect_file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny mixture whose rows divide into every type's blocks, and its level."""
    folder = tmp_path_factory.mktemp("moe")
    case = tiny_models.CASES["qwen3moe"]
    model = tiny_models.make(case, moe_intermediate_size=64)
    keys = {"expert_feed_forward_length": 64}
    source = tiny_models.write(
        replace(case, keys=case.keys | keys), model, folder / "m.gguf", tokenizer=tiny_models.with_merges
    )
    call = ["quantize", str(source), "--to", "MXFP4_MOE", "--imatrix", "none", "--out", str(folder / "out")]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    return source, folder / "out" / "m-MXFP4_MOE.gguf"


def test_experts_are_mxfp4_and_the_rest_eight_bits(made):
    source, path = made
    with GgufFile.open(source) as before, GgufFile.open(path) as after:
        for info in filter(is_quantizable, before.model.tensors):
            expected = "MXFP4" if "_exps" in info.name else "Q8_0"
            assert after.info(info.name).qtype == expected, info.name
        assert level_size(before.model, parse_level("mxfp4_moe")).file_bytes == path.stat().st_size
    found = inspect_file(path)
    assert (found.level_in_name, found.level_in_header, found.truthful) == ("MXFP4_MOE", "MXFP4_MOE", True)


def test_the_engine_runs_what_was_written(made):
    """Its figures are the walk's with inputs rounded as it rounds them, but where a router of random weights is turned
    over."""
    rng = np.random.default_rng(5)
    windows = [Window(f"t{n}", rng.integers(1, tiny_models.N_VOCAB, 80)) for n in range(3)]
    with GgufFile.open(made[0]) as source, GgufFile.open(made[1]) as level:
        walked = token_scores(source, [file_candidate(source, level)], windows, engine_rounding=True)
        found = engine_scores(source, [level], windows, threads=1)
    assert 0 < found[1].kl.mean() < 1
    lost = np.abs(walked[1].nll - walked[0].nll).mean()
    assert np.abs(found[1].nll - walked[1].nll).mean() < 0.4 * lost
    assert found[1].kl.mean() == pytest.approx(walked[1].kl.mean(), rel=0.15)


def test_levels_made_of_it_keep_its_experts(made, tmp_path):
    call = ["quantize", str(made[1]), "--to", "Q4_K_M", "--imatrix", "none", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    with GgufFile.open(tmp_path / "m-Q4_K_M.gguf") as level:
        assert {t.qtype for t in level.model.tensors if "_exps" in t.name} == {"MXFP4"}
