"""MLX folders: arrays as their definition reads them, embedding and head among them, exact sizes, what mlx-lm makes of
them, what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mlx_here
import tiny_models
from bitladder.errors import BadFile, BadWeights, OutputError, UnknownLevel, UsageError
from bitladder.files.checkpoint_check import CheckpointReader, format_of_folder
from bitladder.files.gguf import GgufFile
from bitladder.levels import CheckpointLevel, Needs, parse_level
from bitladder.levels.checkpoints import recognised
from bitladder.plan import preflight
from bitladder.plan.cost import level_size
from bitladder.progress import silent
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.stages.inspect import inspect_folder
from bitladder.walk.checkpoint_weights import CheckpointWeights
from bitladder.walk.layers import LayeredModel
from bitladder.walk.sensitivity import CurvaturePass, curvatures_of
from bitladder.walk.weights import FileWeights
from mlx_here import needs_mlx
from tiny_checkpoints import decoded, difference, loaded, run, tiny, windows_of

pytestmark = pytest.mark.usefixtures("one_thread")
AFFINE = [f"MLX-{bits}bit-g32" for bits in (2, 3, 4, 5, 6, 8)]
FLOATS = ["MLX-mxfp4", "MLX-mxfp8", "MLX-nvfp4"]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def in_bfloat16(name, folder):
    """A tiny model whose checkpoint is in bfloat16, and its GGUF."""
    model, checkpoint, _ = tiny(name, folder)
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    return model.float(), checkpoint, tiny_models.write(tiny_models.CASES[name], model, folder / "source.gguf")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny model with a tied head, and all levels."""
    folder = tmp_path_factory.mktemp("mlx")
    model, checkpoint, gguf = in_bfloat16("llama", folder)
    run(gguf, AFFINE + FLOATS, folder / "out", checkpoint)
    return model, gguf, folder / "out"


def codes_of(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of rows of words, bit by bit: the lowest bits of the first word first."""
    flat = (words[..., None].astype(np.int64) >> np.arange(32) & 1).reshape(len(words), -1, bits)
    return (flat << np.arange(bits)).sum(-1)


def read_as_defined(tensors: dict[str, torch.Tensor], prefix: str, level: str) -> np.ndarray:
    """A matrix by what MLX's documentation says."""
    words, scales = tensors[f"{prefix}.weight"].numpy(), tensors[f"{prefix}.scales"]
    assert words.dtype == np.uint32
    if level in AFFINE:
        biases = tensors[f"{prefix}.biases"]
        assert scales.dtype == biases.dtype == torch.bfloat16
        values = codes_of(words, int(level[4])).astype(np.float32)
        held = (one.float().numpy().repeat(32, 1) for one in (scales, biases))
        return values * next(held) + next(held)
    assert scales.dtype == torch.uint8
    assert f"{prefix}.biases" not in tensors
    fp8 = torch.from_numpy(codes_of(words, 8).astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
    values = fp8 if level == "MLX-mxfp8" else E2M1[codes_of(words, 4)]
    powers = 2.0 ** (scales.numpy().astype(np.float64) - 127)
    held = scales.view(torch.float8_e4m3fn).float().numpy() if level == "MLX-nvfp4" else powers
    return (values * held.repeat(values.shape[1] // held.shape[1], 1)).astype(np.float32)


@pytest.mark.parametrize("level", AFFINE + FLOATS)
def test_arrays_are_what_the_definition_says(level, written, tmp_path):
    model, gguf, out = written
    folder = out / f"tiny-{level}"
    tensors, mine = load_file(folder / "model.safetensors"), decoded(folder, level)
    prefixes = sorted({name.rpartition(".")[0] for name in tensors if name.endswith("scales")})
    assert len(prefixes) == 7 * model.config.num_hidden_layers + 1
    assert "model.embed_tokens" in prefixes
    assert not any("lm_head" in name for name in tensors)
    for prefix in prefixes:
        np.testing.assert_array_equal(read_as_defined(tensors, prefix, level), mine[f"{prefix}.weight"])
    lost = difference(model, loaded(folder, mine, tmp_path / "plain"))
    assert lost < (0.1 if level in ("MLX-8bit-g32", "MLX-6bit-g32") else 2.5 if "2bit" in level else 1.0)
    with GgufFile.open(gguf) as source:
        size = level_size(source.model, parse_level(level))
    assert size.tensor_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    found = inspect_folder(folder)
    assert found.truthful, found.faults
    assert (found.linears, found.stays_float) == (len(prefixes), ())


@pytest.mark.parametrize("level", ["MLX-4bit-g32", "MLX-mxfp4"])
def test_configuration_is_what_mlx_lm_looks_for(level, written):
    folder = written[2] / f"tiny-{level}"
    config = json.loads((folder / "config.json").read_text())
    mode = "affine" if "bit" in level else "mxfp4"
    assert config["quantization"] == config["quantization_config"] == {"group_size": 32, "bits": 4, "mode": mode}
    assert "quant_method" not in config["quantization"]
    assert format_of_folder(folder) == parse_level(level).format


def walked(gguf, folder, level, tokens):
    """Logits of the walk over a folder."""
    with GgufFile.open(gguf) as source:
        own = CheckpointWeights(FileWeights(source), folder, parse_level(level).format)
        model = LayeredModel(source.model, own)
        states = model.embed(tokens, own)
        for layer in range(model.n_layer):
            states = model.run(model.layer(layer, own), layer, states)
        with torch.no_grad():
            logits = model.norm(own)(states) @ torch.from_numpy(own(model.output)).T
    return torch.tanh(logits / model.logit_softcap) * model.logit_softcap if model.logit_softcap else logits


def test_the_walk_reads_embedding_and_head_from_the_folder(written):
    _, gguf, out = written
    level, tokens = "MLX-3bit-g32", windows_of(3, count=1)[0].tokens[None]
    folder = out / f"tiny-{level}"
    weights = decoded(folder, level)
    with torch.no_grad():
        expected = loaded(folder, weights, out / "walked")(torch.from_numpy(tokens)).logits
    with GgufFile.open(gguf) as source:
        own = CheckpointWeights(FileWeights(source), folder, parse_level(level).format)
        table = weights["model.embed_tokens.weight"]
        np.testing.assert_array_equal(own("token_embd.weight"), table)
        np.testing.assert_array_equal(own("token_embd.weight", slice(5, 9)), table[5:9])
        some = np.array([3, 90, 3])
        np.testing.assert_array_equal(own("token_embd.weight", some), table[some])
        assert own.identity("token_embd.weight") != FileWeights(source).identity("token_embd.weight")
        assert own.identity("output_norm.weight") == FileWeights(source).identity("output_norm.weight")
    torch.testing.assert_close(walked(gguf, folder, level, tokens), expected, rtol=1e-3, atol=1e-3)


def test_feedback_reaches_head_and_embedding(tmp_path):
    """A head of its own is quantized by what it reads: its outputs are nearer than those of nearest codes. The
    embedding is quantized by what its errors cost."""
    model, checkpoint, gguf = in_bfloat16("qwen3", tmp_path)
    (report,) = run(gguf, ["MLX-3bit-g32"], tmp_path, checkpoint)
    losses = {loss.name: loss for loss in report.linears}
    tensors = load_file(tmp_path / "tiny-MLX-3bit-g32" / "model.safetensors")
    assert {"lm_head.scales", "model.embed_tokens.scales"} <= tensors.keys()
    assert (losses["lm_head"].tokens, losses["model.embed_tokens"].tokens) == (40 * 64, 40 * 64)
    form = parse_level("MLX-3bit-g32").format
    weight = model.lm_head.weight.detach().float().numpy()
    plain = form.search(weight, None, scale_dtype="bfloat16")
    nearest = plain.decode(plain.grid().nearest(weight))
    mine = read_as_defined(tensors, "lm_head", "MLX-3bit-g32")
    tokens = torch.from_numpy(np.stack([window.tokens for window in windows_of(1)]))
    with torch.no_grad():
        states = model.model(tokens).last_hidden_state.flatten(0, 1).numpy()

    def error(found):
        return float((states @ (found - weight).T).var())

    assert error(mine) < 0.8 * error(nearest)

    with GgufFile.open(gguf) as source:
        weights = FileWeights(source)
        cost = curvatures_of(
            LayeredModel(source.model, weights), weights, windows_of(1), state_bytes=1 << 30, spill=tmp_path,
            half=False, progress=silent,
        ).embedding  # fmt: skip
    table = model.model.embed_tokens.weight.detach().float().numpy()
    plain = form.search(table, None, scale_dtype="bfloat16")
    wrong = [
        found - table
        for found in (
            read_as_defined(tensors, "model.embed_tokens", "MLX-3bit-g32"), plain.decode(plain.grid().nearest(table)),
        )
    ]  # fmt: skip
    mine, nearest = (float(np.einsum("rk,kl,rl->", own, cost, own)) for own in wrong)
    assert mine < 0.8 * nearest


def test_gradients_are_foreseen_and_taken_once(tmp_path, monkeypatch):
    """Levels whose layers alone are quantized need none."""
    _, checkpoint, gguf = in_bfloat16("llama", tmp_path)

    def foreseen(level):
        with GgufFile.open(gguf) as source:
            reading = Reading(windows_of(1))
            job = Calibration(
                source, [parse_level(level)], reading, out_dir=tmp_path, name="tiny", checkpoint=checkpoint
            )
            return job.need.seconds

    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preflight, "ASSUMED_FLOPS", 1e6)
    asked = []
    gradients = CurvaturePass.run
    monkeypatch.setattr(CurvaturePass, "run", lambda *args: asked.append(1) or gradients(*args))
    before = foreseen("MLX-3bit-g32")
    assert before > 10 * foreseen("GPTQ-4bit-g32")
    run(gguf, ["MLX-4bit-g32"], tmp_path, checkpoint)
    assert before > 10 * foreseen("MLX-3bit-g32")
    run(gguf, ["MLX-3bit-g32"], tmp_path, checkpoint)
    assert len(asked) == 1


@pytest.mark.parametrize(("name", "layer", "leaf"), [("mixtral", 0, "w2"), ("ernie4_5moe", 1, "down_proj")])
def test_experts_lie_together_and_routers_stay_float(name, layer, leaf, tmp_path):
    _, checkpoint, gguf = in_bfloat16(name, tmp_path)
    level = "MLX-4bit-g32"
    run(gguf, [level], tmp_path, checkpoint)
    folder = tmp_path / f"tiny-{level}"
    tensors = load_file(folder / "model.safetensors")
    block = f"model.layers.{layer}.{'block_sparse_moe' if name == 'mixtral' else 'mlp'}"
    place = f"{block}.switch_mlp.down_proj"
    assert tensors[f"{place}.weight"].ndim == tensors[f"{place}.biases"].ndim == 3
    assert not any(".experts." in one for one in tensors)
    assert tensors[f"{block}.gate.weight"].dtype == torch.bfloat16
    reader = CheckpointReader(folder, parse_level(level).format)
    whole = reader.weights(f"{place}.weight")
    np.testing.assert_array_equal(reader.weights(f"{block}.experts.1.{leaf}.weight"), whole[1])
    with pytest.raises(BadFile, match="experts"):
        reader.weights(f"{block}.experts.77.{leaf}.weight")
    with GgufFile.open(gguf) as source:
        own = CheckpointWeights(FileWeights(source), folder, parse_level(level).format)
        np.testing.assert_array_equal(own(f"blk.{layer}.ffn_down_exps.weight"), whole)
        size = level_size(source.model, parse_level(level))
    assert size.tensor_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert inspect_folder(folder).truthful


def test_names_of_experts_are_mlx_lms():
    form = parse_level("MLX-4bit-g64").format
    for linear, wanted in (
        ("model.layers.3.mlp.experts.17.up_proj", ("model.layers.3.mlp.switch_mlp.up_proj", 17)),
        ("block_sparse_moe.experts.0.w3", ("block_sparse_moe.switch_mlp.up_proj", 0)),
        ("mlp.shared_experts.up_proj", None),
        ("mlp.gate", None),
        ("self_attn.q_proj", None),
    ):
        assert form.stacked(linear) == wanted


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", ["embedding and head", "all layers quantized"])
def test_a_killed_walk_goes_on(moment, written, tmp_path):
    _, checkpoint, gguf = in_bfloat16("llama", tmp_path)
    level = "MLX-4bit-g32"

    def kill(what, done, total):
        if moment in what:
            raise Killed

    with pytest.raises(Killed):
        run(gguf, [level], tmp_path, checkpoint, progress=kill)
    assert not (tmp_path / f"tiny-{level}").exists()
    run(gguf, [level], tmp_path, checkpoint)
    whole, mine = decoded(written[2] / f"tiny-{level}", level), decoded(tmp_path / f"tiny-{level}", level)
    assert mine.keys() == whole.keys()
    for name, weights in mine.items():
        np.testing.assert_array_equal(weights, whole[name], name)


def test_a_damaged_table_is_noticed(tmp_path):
    _, checkpoint, gguf = in_bfloat16("llama", tmp_path)
    level = "MLX-4bit-g32"
    run(gguf, [level], tmp_path, checkpoint)
    shard = tmp_path / f"tiny-{level}" / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.embed_tokens.weight"].view(torch.int32)[-1, -1] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(OutputError, match=r"embed_tokens does not decode to what was computed"):
        run(gguf, [level], tmp_path, checkpoint)


def test_layers_may_differ_in_bits():
    """As mlx-lm's mixed recipes write them; another size of groups or another mode is told apart from them."""
    base = {"group_size": 64, "bits": 4}
    for apart in ({"group_size": 64, "bits": 6}, {"group_size": 64, "bits": 6, "mode": "affine"}, False, True):
        assert recognised({**base, "model.layers.0.mlp.down_proj": apart}) == parse_level("MLX-4bit-g64").format
    rng = np.random.default_rng(0)
    form = parse_level("MLX-4bit-g64").format
    for bits in (2, 3, 4, 5, 6, 8):
        other = parse_level(f"MLX-{bits}bit-g64").format
        weights = rng.normal(size=(5, 128)).astype(np.float32)
        found = other.search(weights, None)
        codes = found.grid().nearest(weights)
        arrays = other.encode(codes, found)
        np.testing.assert_array_equal(form.decode(arrays), found.decode(codes))
        assert form.shape(arrays) == (5, 128)


@pytest.mark.parametrize(
    "foreign",
    [
        {},
        {"group_size": 64},
        {"group_size": 64, "bits": 7},
        {"group_size": 48, "bits": 4},
        {"group_size": 64.0, "bits": 4},
        {"group_size": [64], "bits": {}},
        {"group_size": 64, "bits": True},
        {"group_size": 64, "bits": 4, "mode": "mxfp4"},
        {"group_size": 32, "bits": 4, "mode": "nf4"},
        {"group_size": 32, "bits": 4, "mode": ["mxfp4"]},
        {"group_size": 64, "bits": 4, "a": {"group_size": 32, "bits": 4}},
        {"group_size": 64, "bits": 4, "a": {"group_size": 32, "bits": 4, "mode": "mxfp4"}},
        {"group_size": 32, "bits": 4, "mode": "mxfp4", "a": {"group_size": 64, "bits": 8, "mode": "affine"}},
        {"group_size": 64, "bits": 4, "quant_method": "awq-like"},
    ],
)
def test_other_configurations_are_not_taken_for_it(foreign):
    assert recognised(foreign) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("scales"), "scales"),
        (lambda arrays: arrays.update(weight=arrays["weight"][:, :-1]), "no number of bits"),
        (lambda arrays: arrays.update(biases=arrays["biases"][:1]), "no number of bits"),
        (lambda arrays: arrays.update(scales=arrays["scales"][:, :0]), "no number of bits"),
        (lambda arrays: arrays.update(weight=arrays["weight"].astype(np.int64)), "expected u32"),
        (lambda arrays: arrays.update(weight=arrays["weight"][None]), "two dimensions"),
    ],
)
def test_arrays_that_contradict_one_another(change, message):
    form = parse_level("MLX-4bit-g32").format
    weights = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    found = form.search(weights, None)
    arrays = form.encode(found.grid().nearest(weights), found)
    change(arrays)
    with pytest.raises((ValueError, KeyError), match=message):
        form.decode(arrays)


def test_names():
    for spelled, name in (("mlx-4BIT-G64", "MLX-4bit-g64"), ("MLX-MXFP4", "MLX-mxfp4"), ("mlx-nvfp4", "MLX-nvfp4")):
        level = parse_level(spelled)
        assert isinstance(level, CheckpointLevel)
        assert (level.name, level.needs, level.engines) == (name, Needs.CALIBRATION, ("mlx-lm", "lmstudio"))
    assert parse_level("MLX-4bit-g64").bpw == 4.5
    assert parse_level("MLX-nvfp4").bpw == 4.5
    for name in ("MLX-7bit-g64", "MLX-4bit-g16", "MLX-1bit-g64"):
        with pytest.raises(UnknownLevel, match=r"MLX-\{2,3,4,5,6,8\}bit"):
            parse_level(name)
    for name in ("MLX", "MLX-", "MLX-mxfp6", "MLX-4bit"):
        with pytest.raises(UnknownLevel, match="MLX"):
            parse_level(name)


def test_rows_that_no_group_divides(tmp_path):
    case = tiny_models.CASES["llama"]
    source = tiny_models.write(case, tiny_models.make(case), tmp_path / "source.gguf")  # feed-forward rows of 96
    odd = tiny_models.write(case, tiny_models.make(case, intermediate_size=100), tmp_path / "odd.gguf")
    with GgufFile.open(source) as file:
        with pytest.raises(UsageError, match="rows of 96") as refused:
            level_size(file.model, parse_level("MLX-4bit-g64"))
        assert "MLX-4bit-g32, MLX-mxfp4" in refused.value.do
    with GgufFile.open(odd) as file, pytest.raises(UsageError, match="rows of 100") as refused:
        level_size(file.model, parse_level("MLX-mxfp4"))
    assert "none; GGUF levels" in refused.value.do
    with pytest.raises(UsageError, match="do not divide"):
        run(source, ["MLX-4bit-g64"], tmp_path, None)
    assert not list(tmp_path.glob("tiny-*"))


@pytest.mark.parametrize(
    ("level", "weight", "said"),
    [
        ("MLX-4bit-g32", 1e6, r"a (scale|bias) of .* does not fit float16"),
        ("MLX-nvfp4", 3e3, r"a weight of 3000; nvfp4 ends at 2688"),
    ],
)
def test_weights_beyond_a_format_are_refused_by_name(level, weight, said, tmp_path):
    model, checkpoint, _ = tiny("llama", tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = weight
    gguf = tiny_models.write(tiny_models.CASES["llama"], model, tmp_path / "large.gguf")
    model.to(torch.float16).save_pretrained(checkpoint)
    with pytest.raises(BadWeights, match=f"model.embed_tokens: {said}"):
        run(gguf, [level], tmp_path, checkpoint)
    assert not (tmp_path / f"tiny-{level}").exists()


def test_a_folder_of_ours_without_its_embedding_is_refused(written, tmp_path):
    _, gguf, out = written
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / "config.json").write_text((out / "tiny-MLX-4bit-g32" / "config.json").read_text())
    tensors = load_file(out / "tiny-MLX-4bit-g32" / "model.safetensors")
    save_file({name: one for name, one in tensors.items() if "embed" not in name}, folder / "model.safetensors")
    with GgufFile.open(gguf) as source:
        own = CheckpointWeights(FileWeights(source), folder, parse_level("MLX-4bit-g32").format)
        with pytest.raises(BadFile, match=r"no tensor 'model\.embed_tokens\.weight'"):
            own("token_embd.weight")


@needs_mlx
@pytest.mark.parametrize("level", AFFINE + FLOATS)
def test_mlx_decodes_as_we_do(level, written, tmp_path):
    folder = written[2] / f"tiny-{level}"
    form, mine = parse_level(level).format, decoded(folder, level)
    for prefix in ("model.layers.1.mlp.down_proj", "model.embed_tokens"):
        theirs = mlx_here.dequantized(
            folder / "model.safetensors", prefix, form.group_size, form.bits, form.mode, tmp_path
        )
        np.testing.assert_allclose(theirs, mine[f"{prefix}.weight"], rtol=1e-6, atol=1e-7)


ROTATED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
POSITIONS = {
    "theta": ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5}),
    "scaled": (ROTATED, {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "type": "linear"}}),
    "part": ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "windows": (
        {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
    ),
    "none": (None, {}),
    "odd": (["x"], {}),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_positions_are_where_mlx_lm_looks(case):
    """transformers 5 writes ``rope_parameters``; most of mlx-lm's models would rotate by their default base."""
    given, wanted = POSITIONS[case]
    form = parse_level("MLX-4bit-g64").format
    entries = form.entries(form.configuration(ignored=()), {"rope_parameters": given, "rope_scaling": None})
    assert {key: value for key, value in entries.items() if "quantization" not in key} == wanted
    kept = form.entries({}, {"rope_parameters": given, **wanted})  # what is there already stays
    assert not {key for key in kept if "quantization" not in key}


@needs_mlx
@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("llama", "MLX-4bit-g32"),
        ("llama", "MLX-3bit-g32"),
        ("llama", "MLX-mxfp4"),
        ("llama", "MLX-nvfp4"),
        ("llama 3 scaling", "MLX-4bit-g32"),
        ("qwen2", "MLX-4bit-g32"),
        ("qwen3", "MLX-4bit-g32"),
        ("phi3", "MLX-4bit-g32"),
        ("olmo2", "MLX-4bit-g32"),
        ("glm4", "MLX-4bit-g32"),
        ("gemma3", "MLX-4bit-g32"),
        ("mixtral", "MLX-4bit-g32"),
    ],
)
def test_mlx_lm_predicts_what_the_walk_says(name, level, tmp_path):
    """Arithmetic in float32: what is left is the order of sums. A choice of experts may tip, which few tokens do."""
    _, checkpoint, gguf = tiny(name, tmp_path)
    run(gguf, [level], tmp_path, checkpoint)
    folder = tmp_path / f"tiny-{level}"
    tokens = np.stack([window.tokens for window in windows_of(3, count=2, n=24)])
    mine = walked(gguf, folder, level, tokens)
    theirs = torch.from_numpy(mlx_here.logits(folder, tokens, tmp_path))
    kl = (mine.softmax(-1) * (mine.log_softmax(-1) - theirs.log_softmax(-1))).sum(-1).abs().flatten()
    assert float(kl.quantile(0.9)) < 1e-4
    if name != "mixtral":
        assert float(kl.max()) < 1e-3
