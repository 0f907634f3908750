"""llama.cpp's mixes of under three bits, written and run: the engine computes with what the walk decodes."""

import numpy as np
import pytest
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.describe.windows import Window
from bitladder.files.gguf import GgufFile
from bitladder.levels import parse_level
from bitladder.plan.cost import level_size
from bitladder.stages.engine_scores import engine_scores
from bitladder.stages.fidelity import file_candidate, token_scores
from bitladder.stages.inspect import inspect_file
from tiny_engine import write_tiny

LEVELS = ("IQ3_M", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""All seven codebook types between them."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codebooks")
    source = write_tiny(folder / "m.gguf")
    call = ["quantize", str(source), "--to", ",".join(LEVELS), "--imatrix", "none", "--effort", "fast"]
    done = CliRunner().invoke(app, [*call, "--out", str(folder / "out")])
    assert done.exit_code == 0, done.output
    return source, {level: folder / "out" / f"m-{level}.gguf" for level in LEVELS}


def test_files_are_what_they_say(made):
    source, files = made
    with GgufFile.open(source) as before:
        for level, path in files.items():
            assert level_size(before.model, parse_level(level)).file_bytes == path.stat().st_size
            found = inspect_file(path)
            assert (found.level_in_header, found.truthful) == (level, True)


def test_the_engine_computes_with_the_same_weights(made):
    windows = [Window("t", np.random.default_rng(5).integers(1, 250, 64))]
    with GgufFile.open(made[0]) as source:
        levels = [GgufFile.open(path) for path in made[1].values()]
        kinds = {tensor.qtype for level in levels for tensor in level.model.tensors}
        assert {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"} <= kinds
        walked = token_scores(source, [file_candidate(source, one) for one in levels], windows, engine_rounding=True)
        found = engine_scores(source, levels, windows, threads=1)
        for one, other in zip(walked[1:], found[1:], strict=True):
            assert other.kl.mean() == pytest.approx(one.kl.mean(), rel=0.1)
        for level in levels:
            level.close()
