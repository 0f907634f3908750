"""mlx-lm's server as an engine of ours: one model, its key, a workload; chosen by what a folder holds."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

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
from tiny_checkpoints import windows_of
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
    """The demo model as MLX runs it."""
    out = tmp_path_factory.mktemp("served")
    with GgufFile.open(demo_gguf) as source:
        reading = Reading(windows_of(1, count=4))
        job = Calibration(source, [parse_level("MLX-8bit-g32")], reading, out_dir=out, name="demo")
        (report,) = job.run().checkpoints
    return Path(report.path)


@needs_mlx
@pytest.mark.model
def test_it_answers_as_its_one_model_to_who_knows_the_key(served):
    launch = Launch(served, n_ctx=512, alias="mine", api_key="secret", threads=1)
    with start(launch) as engine:
        assert engine.identity.engine == "mlx-lm"
        assert engine.identity.version[0].isdigit()
        assert engine.load_seconds > 0
        said = engine.chat(Chat.of("What is the capital of France?", 24))
        assert "Paris" in said.text
        assert (said.model, said.finish_reason) in (("mine", "stop"), ("mine", "length"))
        assert said.completion_tokens > 0
        again = engine.chat(Chat.of("What is the capital of France?", 24))
        assert again.text == said.text
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
@pytest.mark.model
def test_the_gateway_serves_it(served):
    tier = TierSpec("MLX-8bit-g32", path=served, sha256="a" * 64)

    async def run() -> None:
        async with deployed(ServeSettings(tier, threads=1)) as deployment:
            transport = httpx.ASGITransport(build_app(deployment))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
                reply = await client.post(CHAT, json=chat("quality"))
                assert reply.json()["choices"][0]["message"]["content"]

    asyncio.run(run())


@needs_mlx
@pytest.mark.model
def test_a_folder_that_it_cannot_load_ends_it_with_its_words(tmp_path):
    folder = folder_of(tmp_path / "m", {"model_type": "llama", "quantization": MLX})
    with pytest.raises(EngineGone, match="ended with exit code"):
        start(Launch(folder, threads=1))
