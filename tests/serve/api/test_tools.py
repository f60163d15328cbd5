"""Tools: what the model is told, what of its answer is a call, whole and streamed."""

import json
import random
from pathlib import Path

import openai
import pytest
import trl

from support.random_adapters import tokenizer
from support.server import BASE, running, scripted
from veneer.errors import RequestError
from veneer.serve.api.calls import CallReader, call_form
from veneer.serve.api.replies import ChatReply
from veneer.serve.api.tools import Tool, grammar_of_calls
from veneer.serve.engine.grammar import Grammars
from veneer.serve.engine.request import Answer
from veneer.serve.engine.vocabulary import Vocabulary

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# Mistral's two forms, short.
LIST = """{% for m in messages %}{% if m.role == 'user' %}
{% if loop.first and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
[INST]{{ m.content }}[/INST]{% elif m.tool_calls is defined %}[TOOL_CALLS] [
{%- for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments":
{{- ' ' + c.function.arguments | tojson }}, "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}
{%- endfor %}]</s>{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]
{%- else %}{{ m.content }}</s>{% endif %}{% endfor %}"""
NAMED = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}
{%- if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls is defined %}
{%- for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]
{{- c.function.arguments | tojson }}{% endfor %}</s>{% else %}{{ m.content }}</s>
{%- endif %}{% endfor %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says how the weather is.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"$ref": "#/$defs/few"},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ARGUMENTS = {"city": "Rome", "days": 2}
HELLO = [{"role": "user", "content": "Hello"}]


def template(name):
    return {"list": LIST, "named": NAMED}.get(name) or (TEMPLATES / f"{name}.jinja").read_text()


def of_template(name, size=98):
    characters = tokenizer(size)
    characters.chat_template = template(name)
    characters.add_tokens(["\n"])
    characters.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "[ARGS]"]}
    )
    return characters


FORMS = {
    "qwen2_5": '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>',
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>',
    "llama3_2": '{"name": "weather", "parameters": %s}',
    "list": '[TOOL_CALLS] [{"name": "weather", "arguments": %s}]',
    "named": "[TOOL_CALLS]weather[ARGS]%s",
}
CLOSED = json.dumps(ARGUMENTS)


def read(form, text, size=1, names=("weather", "clock")):
    """Return content and calls of a text that comes in pieces of some characters."""
    reader = CallReader(form, names)
    content, calls = "", []
    for start in range(0, len(text), size):
        more, made = reader.feed(text[start : start + size])
        content, calls = content + more, calls + made
    return content + reader.end(), [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("name", FORMS)
def test_calls_are_read_in_the_form_of_the_template(name, size):
    form = call_form(of_template(name))
    call = FORMS[name] % CLOSED
    weather = ("weather", ARGUMENTS)
    assert read(form, call, size) == ("", [weather])
    assert read(form, f"\n{call}\n", size) == ("", [weather])
    if form.opening:
        assert read(form, f"I look it up.\n{call}", size) == ("I look it up.", [weather])
        assert read(form, f"{call}\n{call}", size) == ("", [weather] * 2)
    else:
        assert read(form, f"{call}; {call}", size) == ("", [weather] * 2)
    if name == "list":
        both = f'[TOOL_CALLS][{{"name": "weather", "arguments": {CLOSED}}}, {{"name": "clock"}}]'
        assert read(form, both, size) == ("", [weather, ("clock", {})])


@pytest.mark.parametrize("name", FORMS)
def test_what_is_no_call_is_content_and_whole(name):
    form = call_form(of_template(name))
    call = FORMS[name] % CLOSED
    for text in (
        "Nothing to call.  \n",
        call[:-3] if name != "qwen2_5" else call[:30],
        call.replace("weather", "elsewhere"),
        form.opening + "?",
        form.opening[:4],
        '{"city": "Rome"}',
        "{",
        '[1, 2] and {"a"',
    ):
        content, calls = read(form, text)
        if not calls:  # one without its closing mark is a call yet
            assert content == text


def test_templates_that_write_no_calls_are_refused():
    for name, why in (("gemma3", "no calls"), ("qwen3_6", "not JSON"), ("llama3", "no calls")):
        with pytest.raises(RequestError, match=why):
            call_form(of_template(name))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_an_answer_that_must_call_is_held_to_the_form(name, several):
    """A random walk through the grammar is read back as calls, whose arguments are valid."""
    own = of_template(name)
    form = call_form(own)
    tools = [Tool.model_validate(WEATHER), Tool.model_validate(CLOCK)]
    grammar = grammar_of_calls(form, tools, own, several=several)
    grammars, draw = Grammars(own, len(own)), random.Random(4)
    for _ in range(3):
        matcher, tokens = grammars.matcher(grammar), []
        while not matcher.ended and len(tokens) < 2000:
            allowed = matcher.allowed([2]).nonzero()[:, 0].tolist()
            tokens.append(2 if 2 in allowed else draw.choice(allowed))
            if tokens[-1] == 2:
                break
            matcher.accept(tokens[-1])
        text = own.decode([t for t in tokens if t != 2])
        content, calls = read(form, text, 50)
        assert not content.replace("<think>", "").replace("</think>", "").strip()
        assert calls
        assert several or len(calls) == 1
        for function, arguments in calls:
            if function == "weather":
                assert arguments.keys() == {"city", "days"}
                assert 1 <= arguments["days"] <= 9


@pytest.fixture(params=["qwen2_5", "llama3_2", "list"])
def served(request):
    served = scripted()
    served.tokenizer = of_template(request.param)
    served.engine.words = Vocabulary(served.tokenizer, len(served.tokenizer))
    served.call = FORMS[request.param] % CLOSED
    return served


def test_openais_client_gets_calls_whole_and_streamed(served):
    served.engine.script = [served.call[n : n + 5] for n in range(0, len(served.call), 5)]
    with running(served) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        create = client.chat.completions.create
        asked = {"model": BASE, "messages": HELLO, "tools": [WEATHER, CLOCK]}
        choice = create(**asked).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        assert (call.type, call.function.name) == ("function", "weather")
        assert json.loads(call.function.arguments) == ARGUMENTS
        seen = served.tokenizer.decode(served.engine.requests[-1].tokens)
        assert "Says how the weather is." in seen

        with client.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls"
        assert json.loads(final.message.tool_calls[0].function.arguments) == ARGUMENTS

        turns = [
            *HELLO,
            choice.message,
            {"role": "tool", "tool_call_id": call.id, "content": "Sunny, they say."},
        ]
        create(**{**asked, "messages": turns})
        seen = served.tokenizer.decode(served.engine.requests[-1].tokens)
        assert "Rome" in seen
        assert "Sunny, they say." in seen

        for choice in ("required", {"type": "function", "function": {"name": "clock"}}):
            create(**asked, tool_choice=choice)
            grammar = served.engine.requests[-1].grammar
            assert ("weather" in grammar.text) == (choice == "required")
        create(**asked, tool_choice="none")
        assert served.engine.requests[-1].grammar is None
        assert "weather" not in served.tokenizer.decode(served.engine.requests[-1].tokens)


@pytest.mark.parametrize("most", [1, 16])
def test_several_calls_of_one_answer_are_numbered_and_as_many_as_may_be(most):
    form = call_form(of_template("qwen2_5"))
    call = FORMS["qwen2_5"] % CLOSED
    reply = ChatReply(
        BASE,
        str,
        logprobs=False,
        readers=lambda: CallReader(form, {"weather"}),
        most_calls=most,
    )
    pieces = [Answer(call), Answer(f"\n{call}\n{call}", reason="stop")]
    (choice,) = reply.whole([Answer.joined(pieces)], {})["choices"]
    deltas = [reply.delta(0, piece, 0) or {"delta": {}} for piece in pieces]
    streamed = [c for choice in deltas for c in choice["delta"].get("tool_calls", [])]
    assert [c["index"] for c in streamed] == list(range(min(most, 3)))
    assert len({c["id"] for c in streamed}) == len(streamed)
    assert len(choice["message"]["tool_calls"]) == len(streamed)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_was_cut_says_so_behind_a_whole_call(streamed):
    form = call_form(of_template("qwen2_5"))
    reply = ChatReply(BASE, str, logprobs=False, readers=lambda: CallReader(form, {"weather"}))
    for reason, expected in (("stop", "tool_calls"), ("length", "length")):
        answer = Answer(FORMS["qwen2_5"] % CLOSED, reason=reason)
        if streamed:
            assert reply.delta(0, answer, 0)["delta"]["tool_calls"]
            choice = reply.ending(0, answer)
        else:
            (choice,) = reply.whole([answer], {})["choices"]
            assert choice["message"]["tool_calls"]
        assert choice["finish_reason"] == expected


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "assistant"}]}, "messages[0]"),
    ],
)
def test_what_cannot_be_followed_is_named(more, param):
    served = scripted()
    served.tokenizer = of_template("qwen2_5")
    with running(served) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        body = {"model": BASE, "messages": HELLO, "tools": [WEATHER], "max_tokens": 1}
        with pytest.raises(openai.BadRequestError) as error:
            client.post("/chat/completions", body={**body, **more}, cast_to=object)
        assert error.value.param.startswith(param)
