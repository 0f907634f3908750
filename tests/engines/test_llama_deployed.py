"""The real engine as deployed: calls through a template and the engine's own parser, thoughts, grammar."""

import subprocess
import sys
from pathlib import Path

import pytest

from bitladder.describe.workload_file import parse_workload
from bitladder.engines.base import Chat, Launch
from bitladder.engines.llama import LlamaServer
from bitladder.errors import BadInput
from bitladder.files.gguf import read_header
from bitladder.stages.as_deployed import as_deployed, refuse_unheard_tools
from bitladder.stages.evaluate import answer_workload, judge_answers
from tiny_engine import write_tiny

CALLS = Path(__file__).parents[2] / "scripts" / "tools.jinja"
"""Close to what Hermes and Qwen have."""
THINKS = (Path(__file__).parents[2] / "scripts" / "thinks.jinja").read_text()
WORKLOAD = """
tools:
  - name: get_weather
    description: Weather of a city
    parameters:
      type: object
      properties: {city: {type: string}, days: {type: integer}}
      required: [city]
max_tokens: 60
inputs:
  - id: call
    messages:
"""
SHOT = """\
      - {{role: user, content: "Weather in {0} for {1} days?"}}
      - {{role: assistant, tool_calls: [{{name: get_weather, arguments: {{city: {0}, days: {1}}}}}]}}
      - {{role: tool, content: ok}}
"""
QUESTION = """\
      - {role: user, content: "Weather in Paris for 3 days?"}
    expect: {tool_call: {name: get_weather, arguments: {city: Paris, days: 3}, exact: true}}
  - id: none wanted
    tools: []
    prompt: "Name the capital of France."
    response_format: json_schema
    expect: {json_schema: {type: object, properties: {capital: {type: string, maxLength: 20}}, required: [capital]}}
"""


def workload_of_calls():
    shots = "".join(SHOT.format(*shot) for shot in (("Berlin", 2), ("Rome", 5), ("Oslo", 1), ("Bern", 4)))
    return parse_workload(WORKLOAD + shots + QUESTION, source="w.yaml", read_file=str)


@pytest.mark.model
def test_a_call_by_a_real_model_through_the_template_and_the_engines_parser(demo_gguf, tmp_path):
    """A model of 135 million weights that was never trained for it makes the call when it was shown four."""
    path = tmp_path / "calls.gguf"
    script = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template-file", str(CALLS)]
    subprocess.run([*script, str(demo_gguf), str(path)], check=True, capture_output=True)
    workload = as_deployed(workload_of_calls(), read_header(path).metadata)
    with LlamaServer(Launch(path, n_ctx=1024, n_parallel=1, threads=1)) as server:
        refuse_unheard_tools(workload, server)
        call, held = judge_answers(workload, answer_workload(server, workload))
    assert (call.passed, call.text, call.finish_reason) == (True, "", "tool_calls"), call
    assert call.tokens  # probabilities come with calls, too
    assert held.passed, held


def test_thoughts_end_at_their_budget_and_tools_without_a_place_are_refused(tmp_path):
    """A random model never ends its thought by itself."""
    path = write_tiny(tmp_path / "thinks.gguf", template=THINKS)
    asked = [{"role": "user", "content": "hi"}]
    with LlamaServer(Launch(path, n_ctx=256, n_parallel=1, threads=1)) as server:
        endless = server.chat(Chat(asked, 24))
        limited = server.chat(Chat(asked, 40, max_thought_tokens=8))
        with pytest.raises(BadInput, match="has no place for them"):
            refuse_unheard_tools(workload_of_calls(), server)
    assert endless.unfinished_thought
    assert (endless.text, endless.thought_tokens) == ("", 24)
    assert not limited.unfinished_thought
    assert limited.text
    assert 0 < limited.thought_tokens < 24
