"""Weights in types that models are trained in stay in them, unless another is asked for; so do a file's factors."""

import numpy as np
import pytest
from typer.testing import CliRunner

import gguf_bytes
import tiny_checkpoints
from bitladder.cli.app import app
from bitladder.describe.quantized import kept_note
from bitladder.errors import BadFile, BadInput, UnknownArchitecture
from bitladder.files.describe_source import describe
from bitladder.files.gguf import GgufFile, read_header
from bitladder.formats.blocks import QTYPES, TRAINED
from bitladder.formats.parts import nextn_blocks
from bitladder.formats.recipes import LEVELS, RECIPES, assign, is_quantizable, types_for
from bitladder.formats.tensors import TensorInfo
from bitladder.levels import FeedbackLevel, parse_level
from bitladder.plan.cost import level_size
from bitladder.records.recipe import Recipe
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.stages.feedback import write_with_feedback
from bitladder.stages.fidelity import file_candidate, walk
from bitladder.stages.imatrix import importance_matrix
from bitladder.stages.recipe import named_recipe, refuse_fitted
from bitladder.stages.write_levels import quantize_levels
from gguf_bytes import LLAMA_KEYS, f32, padded, string, strings, tensor

TOKENS = strings("tokenizer.ggml.tokens", [f"token {number}" for number in range(96)])
KEYS = [
    *LLAMA_KEYS,
    f32("llama.attention.layer_norm_rms_epsilon", 1e-5),
    TOKENS,
    string("tokenizer.ggml.model", "gpt2"),
]


def blocks_of(qtype: str, rows: int, columns: int, rng: np.random.Generator) -> bytes:
    """Random blocks whose scales are near one hundredth."""
    row = QTYPES[qtype]
    data = rng.integers(0, 256, (rows * columns // row.block_size, row.type_size)).astype(np.uint8)
    if qtype == "MXFP4":
        data[:, 0] = rng.integers(117, 122, len(data))
    elif qtype == "NVFP4":
        data[:, :4] = rng.integers(8, 40, (len(data), 4))
    return data.tobytes()


def packed_model(path, qtype, *, factors=False, parts=("ffn_gate", "ffn_up", "ffn_down"), layers=2, seed=0):
    """A tiny llama whose feed-forward matrices have a type of its own; ``factors``: a number for each beside it."""
    rng = np.random.default_rng(seed)
    weights = gguf_bytes.tiny_weights(width=64, hidden=128, layers=layers)
    listed, data = [], b""

    def add(name, shape, number, raw):
        nonlocal data
        listed.append(tensor(name, shape[::-1], number, len(data)))
        data += padded(raw)

    for name, array in weights.items():
        if name.split(".")[-2] in parts:
            add(name, array.shape, QTYPES[qtype].ggml_type, blocks_of(qtype, *array.shape, rng))
            if factors:
                add(name.replace(".weight", ".scale"), (1,), 0, np.float32(rng.uniform(0.5, 2)).tobytes())
                add(name.replace(".weight", ".input_scale"), (1,), 0, np.float32(0.1).tobytes())
        else:
            add(name, array.shape, 1 if array.dtype == np.float16 else 0, array.tobytes())
    path.write_bytes(padded(gguf_bytes.header(KEYS, listed)) + data)
    return path


def bitladder(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


QUICK = ("--imatrix", "none", "--effort", "fast", "--threads", "1")


@pytest.mark.parametrize("qtype", ["MXFP4", "NVFP4"])
@pytest.mark.parametrize("level", ["F16", "Q8_0", "Q4_K_M", "Q2_K"])
def test_every_level_keeps_them(tmp_path, qtype, level):
    source = packed_model(tmp_path / "m.gguf", qtype, factors=qtype == "NVFP4")
    result = bitladder("quantize", source, "--to", level, "--out", tmp_path, *QUICK)
    assert result.exit_code == 0, result.output
    assert f"are {qtype}, types that models are trained in" in " ".join(result.output.split())
    with GgufFile.open(source) as before, GgufFile.open(tmp_path / f"m-{level}.gguf") as after:
        assert after.path.stat().st_size == level_size(before.model, parse_level(level)).file_bytes
        for info in before.model.tensors:
            if info.qtype == qtype or info.name.endswith("scale"):
                assert after.info(info.name).qtype == info.qtype
                np.testing.assert_array_equal(after.raw(info.name), before.raw(info.name))
            elif is_quantizable(info) and level != "F16":
                assert after.info(info.name).qtype != info.qtype


@pytest.mark.parametrize("qtype", ["MXFP4", "NVFP4"])
def test_unless_another_type_is_asked_for(tmp_path, qtype):
    source = packed_model(tmp_path / "m.gguf", qtype, factors=qtype == "NVFP4")
    result = bitladder("quantize", source, "--to", "Q8_0", "--out", tmp_path, "--requantize", *QUICK)
    assert result.exit_code == 0, result.output
    with GgufFile.open(source) as before, GgufFile.open(tmp_path / "m-Q8_0.gguf") as after:
        name = "blk.1.ffn_down.weight"
        assert after.info(name).qtype == "Q8_0"
        want = before.read(name)
        assert np.abs(after.read(name) - want).max() <= np.abs(want).max() / 127


def test_every_such_type_at_every_level():
    dims = read_dims()
    for qtype in TRAINED:
        info = TensorInfo("blk.0.ffn_down.weight", (8, 512), qtype)
        other = TensorInfo("blk.0.ffn_up.weight", (8, 512), "F16")
        assert types_for(info) == ()
        assert types_for(other)
        for level in RECIPES:
            assert assign(level, [info, other], dims)[info.name] == qtype
            assert assign(level, [info], dims, requantize=True)[info.name] != qtype


def read_dims():
    class Dims:
        architecture, n_layer, n_gqa, n_expert = "llama", 2, 2, 0

    return Dims()


def test_heads_for_several_tokens_get_eight_bits():
    names = ["blk.0.attn_q.weight", "blk.1.attn_q.weight", "blk.1.nextn.eh_proj.weight", "blk.1.ffn_down.weight"]
    tensors = [TensorInfo(name, (512, 512), "BF16") for name in names]
    assert nextn_blocks(names) == {1}
    for level in LEVELS:
        chosen = assign(level, tensors, read_dims())
        wanted = "F16" if level == "F16" else "Q8_0"
        assert {chosen[name] for name in names[1:]} == {wanted}
    assert assign("Q4_K_M", tensors, read_dims())["blk.0.attn_q.weight"] == "Q4_K"
    small = [TensorInfo(name, (512, 512), "Q4_K") for name in names]
    assert set(assign("Q8_0", small, read_dims()).values()) == {"Q8_0", "Q4_K"}  # what is smaller gains nothing


def test_plan_says_so(tmp_path):
    source = packed_model(tmp_path / "m.gguf", "MXFP4")
    notes = describe(str(source)).notes
    assert "itself quantized (MXFP4" in notes[0]
    assert "% of its weights are MXFP4" in notes[1]
    assert kept_note(read_header(packed_model(tmp_path / "n.gguf", "Q8_0"))) == ""


@pytest.mark.usefixtures("one_thread")
class TestFactors:
    """One number beside each matrix, as NVFP4 has it: the walk multiplies with it as the engine does."""

    def walked(self, path):
        import torch

        from bitladder.walk.layers import LayeredModel
        from bitladder.walk.weights import FileWeights

        with GgufFile.open(path) as file:
            weights = FileWeights(file)
            model = LayeredModel(file.model, weights)
            states = model.embed(np.arange(24).reshape(2, 12), weights)
            for layer in range(model.n_layer):
                states = model.run(model.layer(layer, weights), layer, states)
            return torch.as_tensor(states).numpy()

    def twin(self, path, out):
        """The same model in plain floats, every matrix times its factor."""
        with GgufFile.open(path) as file:
            names = [info.name for info in file.model.tensors]
            weights = {}
            for name in names:
                if name.endswith(".weight"):
                    weights[name] = file.read(name)
                    if name.replace(".weight", ".scale") in names:
                        weights[name] = weights[name] * file.read(name.replace(".weight", ".scale"))
        return gguf_bytes.write_model(out, weights, keys=KEYS)

    def test_the_walk_is_that_of_the_twin(self, tmp_path):
        source = packed_model(tmp_path / "m.gguf", "NVFP4", factors=True)
        want = self.walked(self.twin(source, tmp_path / "twin.gguf"))
        assert np.isfinite(want).all()
        np.testing.assert_array_equal(self.walked(source), want)
        bare = packed_model(tmp_path / "bare.gguf", "NVFP4")  # the same blocks without factors
        assert np.abs(self.walked(bare) - want).max() > 1e-3

    def test_a_factor_that_belongs_to_nothing_is_still_refused(self, tmp_path):
        weights = gguf_bytes.tiny_weights() | {"blk.0.ffn_fancy.scale": np.ones(1, np.float32)}
        with pytest.raises(UnknownArchitecture, match=r"ffn_fancy\.scale"):
            self.walked(gguf_bytes.write_model(tmp_path / "m.gguf", weights, keys=KEYS))

    @pytest.mark.parametrize("rows", [None, slice(2, 9), np.array([0, 5, 11, 3])])
    @pytest.mark.parametrize("count", [1, 3])
    def test_rows_and_experts(self, tmp_path, rows, count):
        from bitladder.walk.weights import FileWeights

        factors = np.linspace(1, 2, count).astype(np.float32)
        stack = np.arange(3 * 4 * 32, dtype=np.float32).reshape(3, 4, 32)
        weights = {"token_embd.weight": np.ones((96, 64), np.float16), "blk.0.ffn_up_exps.weight": stack}
        path = gguf_bytes.write_model(tmp_path / "m.gguf", weights | {"blk.0.ffn_up_exps.scale": factors}, keys=KEYS)
        want = stack * factors[:, None, None]
        with GgufFile.open(path) as file:
            found = FileWeights(file)("blk.0.ffn_up_exps.weight", rows)
        np.testing.assert_array_equal(found, want if rows is None else want.reshape(12, 32)[rows])

    def test_factors_that_do_not_fit_are_refused(self, tmp_path):
        from bitladder.walk.weights import FileWeights

        weights = gguf_bytes.tiny_weights() | {"blk.0.ffn_up.scale": np.ones(2, np.float32)}
        with (
            GgufFile.open(gguf_bytes.write_model(tmp_path / "m.gguf", weights, keys=KEYS)) as file,
            pytest.raises(BadFile, match="2 numbers for 1 matrices"),
        ):
            FileWeights(file)("blk.0.ffn_up.weight")

    def test_a_level_on_the_fly_is_the_written_one(self, tmp_path):
        from bitladder.walk.weights import FileWeights, MadeWeights, Quantizer

        source = packed_model(tmp_path / "m.gguf", "NVFP4", factors=True)
        name = "blk.1.ffn_up.weight"
        with GgufFile.open(source) as opened:
            (made,) = quantize_levels(opened, ["Q4_K_M"], tmp_path / "out", requantize=True)
            qtypes = assign("Q4_K_M", opened.model.tensors, opened.model.dims, requantize=True)
            quantizer = Quantizer(FileWeights(opened))
            fly = MadeWeights(quantizer, qtypes)
            with GgufFile.open(made.path) as written:
                stored = FileWeights(written)
                assert stored.qtype(name) == "Q5_0"  # rows of 64 weights
                np.testing.assert_array_equal(fly(name), stored(name))
                np.testing.assert_array_equal(fly(name, slice(3, 7)), stored(name, slice(3, 7)))
                with pytest.raises(BadInput, match=r"^GPTQ-Q8_0: .*has a factor beside it"):
                    refuse_fitted(written, FeedbackLevel("Q8_0"))
            recipe = Recipe("GPTQ-Q4_K_M", "llama", qtypes, 0, 0.0, None, (), feedback=True)
            with pytest.raises(BadInput, match=r"blk\.0\.ffn_gate\.weight has a factor beside it"):
                write_with_feedback(opened, recipe, tmp_path / "fed", [])

    def test_the_verbs_that_walk(self, tmp_path):
        """Importance, scales folded in, error feedback, fidelity: the other matrices alone change."""
        source = packed_model(tmp_path / "m.gguf", "NVFP4", factors=True, parts=("ffn_up", "ffn_down"))
        windows = tiny_checkpoints.windows_of(0, count=24)
        with GgufFile.open(source) as opened:
            assert "blk.0.ffn_down.weight" in importance_matrix(opened, windows).vectors()
            wanted = [parse_level("AWQ-Q3_K_M")]
            calibration = Calibration(opened, wanted, Reading(windows), out_dir=tmp_path, name="m").run()
            folds = calibration.folds["AWQ-Q3_K_M"]
            assert not [name for name in folds if opened.info(name).qtype == "NVFP4"]
            made = quantize_levels(opened, ["Q3_K_M"], tmp_path, folds=folds)
            fed = write_with_feedback(opened, named_recipe(opened, "Q3_K_M"), tmp_path, windows)
            for path in (made[0].path, fed.file.path):
                with GgufFile.open(path) as level:
                    for name in ("blk.0.ffn_up.weight", "blk.0.ffn_up.scale"):
                        np.testing.assert_array_equal(level.raw(name), opened.raw(name))
                    (fidelity,) = walk(opened, [file_candidate(opened, level)], windows[:4])
                    assert 0 < fidelity.kl_mean < 0.1

    def test_a_file_without_factors_is_a_level_too(self, tmp_path):
        source = packed_model(tmp_path / "m.gguf", "NVFP4", factors=True)
        twin = self.twin(source, tmp_path / "twin.gguf")
        with GgufFile.open(source) as opened, GgufFile.open(twin) as other:
            for pair in ((opened, other), (other, opened)):
                (fidelity,) = walk(pair[0], [file_candidate(*pair)], tiny_checkpoints.windows_of(0, count=2))
                assert fidelity.kl_mean < 1e-7
