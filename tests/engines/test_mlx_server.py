"""mlx-lm's server as an engine of ours: one model, its key, a workload; chosen by what a folder holds."""

import asyncio
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bitladder.engines import mlx_server
from bitladder.engines.base import Chat, Launch, Unsupported
from bitladder.engines.mlx_server import MlxLm
from bitladder.engines.registry import engine_for, start
from bitladder.engines.vllm import Vllm
from bitladder.errors import EngineError, EngineGone
from bitladder.files.gguf import GgufFile
from bitladder.levels import Container, parse_level
from bitladder.serve.app import build_app
from bitladder.serve.deploy import deployed
from bitladder.serve.settings import ServeSettings, TierSpec
from bitladder.stages.calibrate import Calibration, Reading
from mlx_here import needs_mlx
from tiny_checkpoints import windows_of, write_tokenizer
from upstreams import CHAT, chat

MLX = {"group_size": 64, "bits": 4}


def folder_of(path: Path, config: dict) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_folders_go_to_the_engine_of_their_format(tmp_path, monkeypatch):
    monkeypatch.setattr(MlxLm, "missing", lambda _: "")
    monkeypatch.setattr(Vllm, "missing", lambda _: "")
    for name, config, kind in (
        ("mlx", {"quantization": MLX}, MlxLm),
        ("mlx, twice", {"quantization": MLX, "quantization_config": MLX}, MlxLm),
        ("gptq", {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}}, Vllm),
        ("floats", {}, Vllm),
    ):
        folder = folder_of(tmp_path / name, config)
        assert isinstance(engine_for(Container.FOLDER, folder), kind), name
    monkeypatch.setattr(MlxLm, "missing", lambda _: "Install it.")
    with pytest.raises(EngineError, match="mlx-lm is not installed"):
        engine_for(Container.FOLDER, tmp_path / "mlx")
    assert isinstance(engine_for(Container.FOLDER, tmp_path / "gptq"), Vllm)


def test_a_program_that_is_none_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(mlx_server.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "bitladder[mlx]" in MlxLm().missing()
    for text in ("#!/nowhere/python\n", "\x7fELF", "", "#!" + "x" * 100_000):
        (tmp_path / "mlx_lm.server").write_text(text)
        (tmp_path / "mlx_lm.server").chmod(0o755)
        assert MlxLm().missing()


@pytest.fixture(scope="module")
def served(tmp_path_factory, demo_gguf):
    """A tiny model with a real tokenizer, as MLX runs it; what it says means nothing."""
    folder = tmp_path_factory.mktemp("served")
    config = LlamaConfig(
        vocab_size=write_tokenizer(folder, demo_gguf), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    form = parse_level("MLX-8bit-g32").format
    tensors = {}
    for name, value in LlamaForCausalLM(config).state_dict().items():
        if name == "lm_head.weight":
            continue
        if value.ndim == 1:
            tensors[name] = value.to(torch.float16)
            continue
        found = form.search(value.numpy(), None, quick=True)
        for suffix, array in form.encode(found.grid().nearest(value.numpy()), found).items():
            own = torch.from_numpy(np.ascontiguousarray(array))
            stem = name.removesuffix("weight")
            tensors[stem + suffix] = own.to(torch.float16) if suffix in form.model_dtype else own
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    scheme = form.configuration(ignored=())
    described = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(described | form.entries(scheme, described)))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return folder


@needs_mlx
def test_it_answers_as_its_one_model_to_who_knows_the_key(served):
    launch = Launch(served, n_ctx=512, alias="mine", api_key="secret", threads=1)
    with start(launch) as engine:
        assert engine.identity.engine == "mlx-lm"
        assert engine.identity.version[0].isdigit()
        assert engine.load_seconds > 0
        said = engine.chat(Chat.of("What is the capital of France?", 8))
        assert said.text
        assert said.model == "mine"
        assert said.finish_reason in ("stop", "length")
        assert 0 < said.completion_tokens <= 8
        assert engine.chat(Chat.of("What is the capital of France?", 8)).text == said.text
        with pytest.raises(Unsupported):
            engine.tokenize("x")
        body = {"model": "somebody/else", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        address = f"{engine.base_url}/v1/chat/completions"
        with httpx.Client(trust_env=False, timeout=60) as stranger:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                assert stranger.post(address, json=body, headers=headers).status_code == 401
                assert stranger.get(f"{engine.base_url}/v1/models", headers=headers).status_code == 401
            known = {"authorization": "Bearer secret", "origin": "http://evil.example"}
            reply = stranger.post(address, json=body, headers=known)
            assert reply.json()["model"] == "mine"  # nothing else is loaded, whatever is asked for
            assert "access-control-allow-origin" not in reply.headers
    assert engine.poll() is not None


@needs_mlx
def test_the_gateway_serves_it(served):
    tier = TierSpec("MLX-8bit-g32", path=served, sha256="a" * 64)

    async def run() -> None:
        async with deployed(ServeSettings(tier, threads=1)) as deployment:
            transport = httpx.ASGITransport(build_app(deployment))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
                reply = await client.post(CHAT, json=chat("quality", max_tokens=8))
                assert reply.json()["choices"][0]["message"]["content"]

    asyncio.run(run())


@needs_mlx
def test_a_folder_that_it_cannot_load_ends_it_with_its_words(tmp_path):
    folder = folder_of(tmp_path / "m", {"model_type": "llama", "quantization": MLX})
    with pytest.raises(EngineGone, match="ended with exit code") as gone:
        start(Launch(folder, threads=1))
    assert "No safetensors found" in gone.value.means


@needs_mlx
@pytest.mark.model
def test_a_real_model_answers(tmp_path, demo_gguf):
    with GgufFile.open(demo_gguf) as source:
        reading = Reading(windows_of(1, count=20))
        (report,) = (
            Calibration(source, [parse_level("MLX-8bit-g32")], reading, out_dir=tmp_path, name="demo").run().checkpoints
        )
    with start(Launch(report.path, threads=1)) as engine:
        assert "Paris" in engine.chat(Chat.of("What is the capital of France?", 24)).text
