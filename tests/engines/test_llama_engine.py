"""The real llama.cpp in its child process: what it answers, and every way it can end."""

import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from bitladder.describe.workload import Input
from bitladder.engines.base import Chat, Launch
from bitladder.engines.chat_api import Timeouts
from bitladder.engines.llama import LlamaServer, LlamaSettings
from bitladder.errors import BadInput, EngineError, EngineGone, EngineReply, EngineTimeout
from bitladder.files.workloads import load_workload
from bitladder.serve.compare import first_difference, later_partings
from bitladder.stages.evaluate import answer_workload, decode_rates, judge_answers, measure_speed, warm_up

pytestmark = pytest.mark.model

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer with one sentence."}]
STORY = [{"role": "user", "content": "Tell a long story about a sailor."}]


@pytest.fixture(scope="module")
def server(demo_gguf):
    with LlamaServer(Launch(demo_gguf, n_ctx=512, n_parallel=2, threads=1)) as running:
        yield running


def test_text_and_tokens(server):
    tokens = server.tokenize("The capital of France is")
    assert server.detokenize(tokens) == "The capital of France is"
    assert server.continue_tokens(tokens, max_tokens=1)[0].text == " Paris"
    assert server.tokenize("<|im_end|>") == [2]
    assert server.render(QUESTION).endswith("one sentence.<|im_end|>\n<|im_start|>assistant\n")
    assert server.props()["total_slots"] == 2


def test_a_greedy_chat_is_the_same_each_time_and_carries_its_tokens(server):
    first = server.chat(Chat(QUESTION, 24, logprobs=3))
    second = server.chat(Chat(QUESTION, 24, logprobs=3))
    assert "Paris" in first.text
    assert (first.text, first.tokens) == (second.text, second.tokens)
    assert first.finish_reason == "stop"
    assert first.completion_tokens == len(first.tokens)
    assert first.tokens[-1].token_id == 2  # what ended the answer is among them
    assert all(token.top[0].token_id == token.token_id and len(token.top) == 3 for token in first.tokens)
    assert first.prompt_tokens == len(server.tokenize(server.render(QUESTION), add_special=True))
    assert first.timings.prompt_tokens == first.prompt_tokens  # no cache
    assert first.model == server.name


def test_sampling_follows_its_seed(server):
    said = [server.chat(Chat(STORY, 12, temperature=1.5, seed=seed)).text for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_speed_is_measured_with_one_request(server):
    speed = measure_speed(server)
    assert 0 < speed.decode_tokens_per_s < speed.prefill_tokens_per_s
    assert speed.load_seconds > 0


def test_a_prompt_that_the_engine_holds_is_decoded_after_and_not_computed(server):
    tokens = server.tokenize("The harbour was quiet in the early morning. " * 4, add_special=True)
    anew, again = server.time_tokens(tokens, max_tokens=4), server.time_tokens(tokens, max_tokens=4, again=True)
    assert anew["prompt_n"] == len(tokens) and again["prompt_n"] < len(tokens) // 4
    assert anew["predicted_n"] == again["predicted_n"] == 4
    assert server.time_tokens(tokens, max_tokens=4)["prompt_n"] == len(tokens)
    warm_up(server)
    decode_rates(server, 0)
    prefill, decode = decode_rates(server, 0, again=True)
    assert math.isnan(prefill) and decode > 0


def test_a_workload_and_a_level_that_is_the_reference(server):
    workload = load_workload()
    few = type(workload)("few", workload.inputs[:3])
    answers = judge_answers(few, answer_workload(server, few))
    assert answers[0].passed


def test_a_level_goes_on_as_itself_after_any_place(server):
    said = server.chat(Chat(QUESTION, 24, logprobs=10)).tokens
    prompt = server.tokenize(server.render(QUESTION), add_special=True)
    first = first_difference(said[:1], server.chat(Chat(STORY, 1, logprobs=10)).tokens)
    assert first is not None
    # Batches of another shape round differently, so a tie may turn; damage it cannot be.
    assert all(place.is_tie for place in later_partings(said, first, server, prompt))
    ids = [choice.token_id for choice in said]
    (end,) = server.continue_tokens(prompt + ids[:-1], max_tokens=1)
    assert end.token_id == ids[-1] == 2  # where it would end is a token, too


def test_a_prompt_longer_than_the_context_is_an_error_and_not_the_end(server):
    with pytest.raises(EngineReply, match=r"status 400.*exceeds the available context size") as told:
        server.chat(Chat.of("word " * 2000, 4))
    assert "larger context" in told.value.do
    assert server.chat(Chat(QUESTION, 2)).completion_tokens == 2


def test_dying_in_the_middle_of_an_answer(demo_gguf):
    with LlamaServer(Launch(demo_gguf, n_ctx=2048, threads=1)) as running:
        killer = threading.Timer(0.5, os.kill, (running.process.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(EngineGone) as caught:
            running.chat(Chat(STORY, 2000))
        killer.join()
        assert caught.match("was ended by SIGKILL")
        assert "Its last words:" in caught.value.means
        with pytest.raises(EngineGone, match="was ended by SIGKILL"):
            running.tokenize("gone")


def test_a_stall_is_noticed(demo_gguf):
    with LlamaServer(Launch(demo_gguf, n_ctx=512, threads=1), timeouts=Timeouts(stall_s=1.0)) as running:
        os.kill(running.process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(EngineTimeout, match="not answer in time while waiting for its reply"):
                running.chat(Chat(QUESTION, 4))
        finally:
            os.kill(running.process.pid, signal.SIGCONT)


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 99, 0, 0))
    with pytest.raises(EngineGone) as caught:
        LlamaServer(Launch(path)).start()
    assert caught.match("The engine for 'bad' ended with exit code 1")
    assert "failed to read header" in caught.value.means


def test_a_truncated_model(tmp_path, demo_gguf):
    path = tmp_path / "short.gguf"
    with demo_gguf.open("rb") as file:
        path.write_bytes(file.read(5_000_000))
    with pytest.raises(EngineGone, match="ended with exit code 1"):
        LlamaServer(Launch(path)).start()


def test_too_little_time_to_load(demo_gguf):
    process = LlamaServer(Launch(demo_gguf))
    with pytest.raises(EngineTimeout, match="did not load"):
        process.start(timeout_s=0.01)
    assert process.poll() is not None  # stopped, not left behind


def test_arguments_that_cannot_be():
    with pytest.raises(BadInput, match=r"There is no file '/nowhere/x.gguf'"):
        LlamaServer(Launch("/nowhere/x.gguf")).start()
    with pytest.raises(BadInput, match=r"The n_parallel of an engine must be at least 1\. Got 0 instead"):
        LlamaSettings("x", n_parallel=0)
    with pytest.raises(BadInput, match=r"cache_type_k of an engine must be one of .*q8_0.* Got 'q9' instead"):
        LlamaSettings("x", cache_type_k="q9")
    with pytest.raises(EngineError, match="not running"):
        LlamaServer(Launch("x")).tokenize("before it was started")


def test_it_dies_with_us(demo_gguf):
    """The parent is killed without a chance to clean up."""
    script = (
        "import sys, time; from bitladder.engines.base import Launch; from bitladder.engines.registry import start\n"
        "server = start(Launch(sys.argv[1], n_ctx=64, threads=1))\n"
        "print(server.process.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(demo_gguf)], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_closing_twice_does_no_harm(demo_gguf):
    running = LlamaServer(Launch(demo_gguf, n_ctx=64, threads=1)).start()
    pid = running.process.pid
    running.close()
    running.close()
    assert not Path(f"/proc/{pid}").exists()


def test_input_type_is_what_the_engine_gets(server):
    one = Input("i", ({"role": "system", "content": "Reply in capitals."}, {"role": "user", "content": "hi"}), ())
    assert "Reply in capitals." in server.render(one.messages)
