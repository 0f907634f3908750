# ruff: noqa: D103 - each check is called what it checks
"""The clients' side of scripts/acceptance-clients; it runs in an environment where Bitladder is not installed.

    acceptance_clients.py URL [--tools URL]

The first gateway serves a model whose chat template has no place for tools, the second one whose template has; what is
asked of a model of 135 million parameters is the right shape, not the right answer.
"""

import argparse
import asyncio
import sys
import traceback
from collections.abc import Callable
from typing import Any

import anthropic
import openai
from pydantic import BaseModel

SAID = [{"role": "user", "content": "Name three colours."}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "The weather in a city", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
LEAST = {"temperature": 0, "max_tokens": 12}
GREEDY = {"temperature": 0}
CALLING = {"temperature": 0, "max_tokens": 80}


class City(BaseModel):
    """What structured output is asked for."""

    city: str


class Clients:
    """The clients of one gateway."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        self.anthropic = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=300)


# OpenAI's own client


def chat_document_and_stream(to: Clients) -> None:
    whole = to.openai.chat.completions.create(model="auto", messages=SAID, **LEAST)
    stream = to.openai.chat.completions.create(
        model="auto", messages=SAID, stream=True, stream_options={"include_usage": True}, **LEAST
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage.completion_tokens == 12


def models(to: Clients) -> None:
    listed = to.openai.models.list().data
    assert to.openai.models.retrieve(listed[-1].id).id == listed[-1].id
    assert all(one.created > 1_600_000_000 for one in listed)


def legacy_log_probabilities(to: Clients) -> None:
    choice = to.openai.completions.create(model="auto", prompt="One, two,", logprobs=2, **LEAST).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text and len(told.token_logprobs) == len(told.top_logprobs) == 12
    assert all(len(top) >= 1 for top in told.top_logprobs) and told.text_offset[0] == 0


SHORT = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
"""What ends of itself: OpenAI's helper takes a stream for broken that ends with ``response.incomplete``."""


def responses_document_and_stream(to: Clients) -> None:
    asked = {"model": "auto", "input": "Name three colours.", "max_output_tokens": 12, "temperature": 0}
    whole = to.openai.responses.create(**asked)
    assert whole.output_text and whole.status == "incomplete" and whole.usage.output_tokens == 12
    assert whole.incomplete_details.reason == "max_output_tokens"
    events = list(to.openai.responses.create(stream=True, **asked))
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == whole.output_text
    shape = {"format": {"type": "json_schema", "name": "city", "schema": SHORT, "strict": True}}
    with to.openai.responses.stream(model="auto", input="x", text=shape) as stream:
        text = "".join(one.delta for one in stream if one.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text and "Paris" in text


def responses_structured_output(to: Clients) -> None:
    asked = {"model": "auto", "input": "Where is the Louvre?", "max_output_tokens": 60, "temperature": 0}
    assert isinstance(to.openai.responses.parse(text_format=City, **asked).output_parsed, City)


def errors(to: Clients) -> None:
    for attempt in (
        lambda: to.openai.responses.create(model="nothing", input="x"),
        lambda: to.openai.chat.completions.create(model="nothing", messages=SAID),
        lambda: to.anthropic.messages.create(model="nothing", messages=SAID, max_tokens=5),
    ):
        try:
            attempt()
        except (openai.NotFoundError, anthropic.NotFoundError) as error:
            assert "No model 'nothing'" in str(error)
        else:
            raise AssertionError("an unknown model answered")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    try:
        to.openai.chat.completions.create(model="auto", messages=[{"role": "user", "content": [picture]}])
    except openai.BadRequestError:
        return
    raise AssertionError("a blind model answered about a picture")


def asynchronous(to: Clients) -> None:
    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=f"{to.url}/v1", api_key="none", timeout=300) as client:
            chat = client.chat.completions.create(model="auto", messages=SAID, **LEAST)
            response = client.responses.create(model="auto", input="Name three colours.", max_output_tokens=12)
            first, second = await asyncio.gather(chat, response)
            assert first.choices[0].message.content and second.output_text
        claude = anthropic.AsyncAnthropic(base_url=to.url, api_key="none", timeout=300)
        async with claude, claude.messages.stream(model="auto", messages=SAID, max_tokens=12) as stream:
            assert "".join([text async for text in stream.text_stream])

    asyncio.run(all_of_them())


# Anthropic's


def messages_document_and_stream(to: Clients) -> None:
    asked = {"model": "auto", "system": "Be brief.", "messages": SAID, "max_tokens": 12, "extra_body": GREEDY}
    whole = to.anthropic.messages.create(**asked)
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 12)
    with to.anthropic.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        assert text == whole.content[0].text == stream.get_final_message().content[0].text
    stopped = to.anthropic.messages.create(**{**asked, "max_tokens": 60}, stop_sequences=[" "])
    assert stopped.stop_reason in ("stop_sequence", "end_turn")


def messages_count(to: Clients) -> None:
    counted = to.anthropic.messages.count_tokens(model="auto", messages=SAID).input_tokens
    usage = to.anthropic.messages.create(model="auto", messages=SAID, max_tokens=1).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


# What is built on them


def litellm_in_three_apis(to: Clients) -> None:
    import litellm

    common = {"api_key": "none", "timeout": 300}
    chat = litellm.completion(model="openai/auto", api_base=f"{to.url}/v1", messages=SAID, **common, **LEAST)
    assert chat.choices[0].message.content
    chunks = litellm.completion(
        model="openai/auto", api_base=f"{to.url}/v1", messages=SAID, stream=True, **common, **LEAST
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    claude = litellm.completion(model="anthropic/auto", api_base=to.url, messages=SAID, **common, **LEAST)
    assert claude.choices[0].message.content
    response = litellm.responses(
        model="openai/auto", api_base=f"{to.url}/v1", input="Name three colours.", max_output_tokens=12, **common
    )
    assert response.output[0].content[0].text


def langchain(to: Clients) -> None:
    from langchain_anthropic import ChatAnthropic
    from langchain_openai import ChatOpenAI

    common = {"model": "auto", "api_key": "none", "timeout": 300, "max_tokens": 12, "temperature": 0}
    for more in ({}, {"use_responses_api": True}):
        model = ChatOpenAI(base_url=f"{to.url}/v1", **common, **more)
        assert model.invoke("Name three colours.").text
        assert "".join(chunk.text for chunk in model.stream("Name three colours."))
    claude = ChatAnthropic(base_url=to.url, **common)
    assert claude.invoke("Name three colours.").text
    assert "".join(chunk.text for chunk in claude.stream("Name three colours."))


def instructor_with_a_schema(to: Clients) -> None:
    import instructor

    client = instructor.from_openai(to.openai, mode=instructor.Mode.JSON_SCHEMA)
    asked = {"model": "auto", "max_retries": 1, "messages": [{"role": "user", "content": "Where is the Louvre?"}]}
    assert isinstance(client.chat.completions.create(response_model=City, **asked, temperature=0, max_tokens=60), City)


def tools_are_refused(to: Clients) -> None:
    for choice in ("auto", "required", {"type": "function", "function": {"name": "weather"}}):
        try:
            to.openai.chat.completions.create(model="auto", messages=SAID, tools=TOOLS, tool_choice=choice, **LEAST)
        except openai.BadRequestError as error:
            assert "does not support tools" in str(error)
        else:
            raise AssertionError(f"tools were left out without a word ({choice})")


# A model that can be told of tools


def forced_calls(to: Clients) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        reply = to.openai.chat.completions.create(
            model="auto", messages=SAID, tools=TOOLS, tool_choice=choice, **CALLING
        )
        assert reply.choices[0].message.tool_calls[0].function.name == "weather"
    response = to.openai.responses.create(
        model="auto", input="x", tools=[{"type": "function", **FUNCTION, "strict": False}], max_output_tokens=80,
        tool_choice="required", temperature=0,
    )  # fmt: skip
    assert response.output[-1].type == "function_call"
    tool = {"name": "weather", "input_schema": PARAMETERS}
    asked = {"model": "auto", "messages": SAID, "tools": [tool], "max_tokens": 80, "extra_body": GREEDY}
    message = to.anthropic.messages.create(tool_choice={"type": "tool", "name": "weather"}, **asked)
    assert (message.stop_reason, message.content[-1].type) == ("tool_use", "tool_use")
    with to.anthropic.messages.stream(tool_choice={"type": "any"}, **asked) as stream:
        call = stream.get_final_message().content[-1]
        assert call.name == "weather" and set(call.input) == {"city"}


def frameworks_call(to: Clients) -> None:
    import instructor
    from langchain_anthropic import ChatAnthropic
    from langchain_openai import ChatOpenAI

    common = {"model": "auto", "api_key": "none", "timeout": 300, "temperature": 0, "max_tokens": 80}
    models = [ChatOpenAI(base_url=f"{to.url}/v1", **common), ChatAnthropic(base_url=to.url, **common)]
    for model in models:
        assert (
            model.bind_tools([City], tool_choice="City").invoke("Where is the Louvre?").tool_calls[0]["name"] == "City"
        )
    client = instructor.from_openai(to.openai, mode=instructor.Mode.TOOLS)
    asked = {"model": "auto", "max_retries": 1, "messages": [{"role": "user", "content": "Where is the Louvre?"}]}
    assert isinstance(client.chat.completions.create(response_model=City, **asked, temperature=0, max_tokens=80), City)


PLAIN: tuple[Callable[[Clients], Any], ...] = (
    chat_document_and_stream, models, legacy_log_probabilities, responses_document_and_stream,
    responses_structured_output, errors, asynchronous, messages_document_and_stream, messages_count,
    litellm_in_three_apis, langchain, instructor_with_a_schema, tools_are_refused,
)  # fmt: skip
WITH_TOOLS = (forced_calls, frameworks_call)


def main() -> int:
    """Run every check; the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--tools", help="A gateway whose model's chat template has a place for tools.")
    parser.add_argument("--only", help="Only this check.")
    given = parser.parse_args()
    checks = [(check, Clients(given.url)) for check in PLAIN]
    checks += [(check, Clients(given.tools)) for check in WITH_TOOLS if given.tools]
    failed = 0
    for check, clients in checks:
        if given.only in (None, check.__name__):
            try:
                check(clients)
                print(f"ok      {check.__name__}", flush=True)
            except Exception:  # every failure is reported, whatever it is
                failed += 1
                print(f"FAILED  {check.__name__}\n{traceback.format_exc()}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
