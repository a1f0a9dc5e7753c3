"""Fills the published halves of the golden files; see README.md here. Needs openai-harmony and the o200k vocabulary.

    TIKTOKEN_ENCODINGS_BASE=DIR python tests/golden/regenerate.py --template chat_template.jinja

Each file in harmony/ has a half written by hand, "given" (a conversation in Keel's own fields) or "drawn" (the text of
replies), and a half written by this script from what OpenAI publishes: "library" (openai-harmony's rendering or
reading) and "template" (the rendering of the chat template that comes with the weights).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import openai_harmony as oh
from tokenizers import Regex, pre_tokenizers

HERE = Path(__file__).parent
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
    "<|endofprompt|>": 200018,
}


def library_conversation(given: dict[str, Any]) -> oh.Conversation:
    """Keel's messages as the library's, system and developer message in front."""
    options, tools = given["options"], given["tools"]
    system = oh.SystemContent.new().with_reasoning_effort(oh.ReasoningEffort(options["reasoning_effort"].title()))
    if options["system_date"]:
        system = system.with_conversation_start_date(options["system_date"])
    if any(tool["name"] == "python" for tool in tools):
        system = system.with_python_tool()
    messages = [oh.Message.from_role_and_content(oh.Role.SYSTEM, system)]
    spoken = list(given["messages"])
    developer = oh.DeveloperContent.new()
    if spoken[0]["role"] in ("system", "developer"):
        developer = developer.with_instructions(spoken.pop(0)["content"])
    functions = [
        oh.ToolDescription.new(
            tool["name"], tool["description"], tool["parameters"] if tool["parameters"].get("properties") else None
        )
        for tool in tools
        if tool["name"] != "python"
    ]
    if functions:
        developer = developer.with_function_tools(functions)
    if developer.instructions or functions:
        messages.append(oh.Message.from_role_and_content(oh.Role.DEVELOPER, developer))
    return oh.Conversation.from_messages([*messages, *map(library_message, spoken)])


def library_message(message: dict[str, Any]) -> oh.Message:
    """One message. A call's recipient goes behind the channel, where the format guide shows it being drawn."""
    role = oh.Role(message["role"])
    if role is oh.Role.DEVELOPER:
        return oh.Message.from_role_and_content(role, oh.DeveloperContent.new().with_instructions(message["content"]))
    made = oh.Message.from_author_and_content(oh.Author(role=role, name=message.get("name")), message["content"])
    channel, kind = message.get("channel"), message.get("content_type")
    if role is oh.Role.TOOL:
        return made.with_recipient("assistant").with_channel(channel or "commentary")
    if message.get("recipient"):
        channel = f"{channel} to={message['recipient']}"
    if channel:
        made = made.with_channel(channel)
    if kind:
        made = made.with_content_type(kind if kind == "code" else f"<|constrain|>{kind}")
    return made


def declaration(encoding: oh.HarmonyEncoding, schema: dict[str, Any]) -> str:
    """The `# Tools` section of one function."""
    described = oh.DeveloperContent.new().with_function_tools([oh.ToolDescription.new("f", "Does it.", schema)])
    message = oh.Message.from_role_and_content(oh.Role.DEVELOPER, described)
    text = encoding.decode(encoding.render_conversation(oh.Conversation.from_messages([message])))
    return text.partition("<|message|>")[2].removesuffix("<|end|>")


def close_calls(tokens: list[int]) -> list[int]:
    """`<|call|>` where the library, which was not told of the recipient, ends a call with `<|end|>`."""
    closed = list(tokens)
    encoding = oh.load_harmony_encoding("HarmonyGptOss")
    starts = [place for place, token in enumerate(tokens) if token == SPECIAL["<|start|>"]]
    for start, stop in pairwise(starts):
        header = encoding.decode(tokens[start : tokens.index(SPECIAL["<|message|>"], start)])
        if header.startswith("<|start|>assistant") and " to=" in header:
            closed[stop - 1] = SPECIAL["<|call|>"]
    return closed


def template_messages(given: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Keel's messages as the template takes them; None if it has no place for them."""
    turned: list[dict[str, Any]] = []
    thoughts = None
    for message in given["messages"]:
        if message["role"] == "assistant" and message["channel"] == "analysis" and not message.get("recipient"):
            thoughts = message["content"]
            continue
        entry = {"role": message["role"], "content": message["content"]}
        if message.get("recipient"):
            if not message["recipient"].startswith("functions."):
                return None
            name = message["recipient"].removeprefix("functions.")
            call = {"name": name, "arguments": json.loads(message["content"])}
            entry = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
        elif message["role"] == "assistant" and message["channel"] != "final":
            return None
        if message["role"] == "assistant" and thoughts is not None:
            entry["thinking"], thoughts = thoughts, None
        if message.get("name") and message["role"] == "user":
            return None
        turned.append(entry)
    return turned


def template_text(template: jinja2.Template, given: dict[str, Any]) -> str | None:
    """What the template writes, to the start of the next reply."""
    messages = template_messages(given)
    if messages is None:
        return None
    functions = [{"type": "function", "function": tool} for tool in given["tools"] if tool["name"] != "python"]
    return template.render(
        messages=messages,
        tools=functions or None,
        builtin_tools=["python"] if any(tool["name"] == "python" for tool in given["tools"]) else None,
        reasoning_effort=given["options"]["reasoning_effort"],
        strftime_now=lambda _: given["options"]["system_date"],
        add_generation_prompt=True,
    )


def load_template(path: Path) -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(path.read_text(encoding="utf-8"))


def read_reply(encoding: oh.HarmonyEncoding, text: str) -> dict[str, Any]:
    """A drawn reply as the library reads it."""
    tokens = encoding.encode(text, allowed_special="all")
    try:
        messages = encoding.parse_messages_from_completion_tokens(tokens, role=oh.Role.ASSISTANT)
    except oh.HarmonyError:
        return {"tokens": tokens, "messages": None}
    return {
        "tokens": tokens,
        "messages": [
            {
                "content": message.content[0].text,  # type: ignore[attr-defined]
                "channel": message.channel,
                "recipient": message.recipient,
                "content_type": message.content_type,
            }
            for message in messages
        ],
    }


def merges_of(texts: list[str], ranks: dict[bytes, int]) -> dict[bytes, tuple[bytes, bytes]]:
    """Every token that byte-pair merging makes on the way through `texts`, with the pair it is made of."""
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    made: dict[bytes, tuple[bytes, bytes]] = {}
    for word in words:
        _merge(word.encode(), ranks, len(ranks) + 1, made)
    # A token's own pair is what merging its bytes, with the tokens before it, ends in.
    todo = list(made)
    while todo:
        token = todo.pop()
        parts = _merge(token, ranks, ranks[token], {})
        made[token] = (parts[0], parts[1])
        todo += [part for part in parts if len(part) > 1 and part not in made]
    return made


def _merge(word: bytes, ranks: dict[bytes, int], below: int, made: dict[bytes, tuple[bytes, bytes]]) -> list[bytes]:
    parts = [word[place : place + 1] for place in range(len(word))]
    while len(parts) > 1:
        candidates = [(ranks.get(a + b, below), place) for place, (a, b) in enumerate(pairwise(parts))]
        rank, place = min(candidates)
        if rank >= below:
            return parts
        made.setdefault(parts[place] + parts[place + 1], (parts[place], parts[place + 1]))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def write_subset(texts: list[str], ranks: dict[bytes, int]) -> None:
    """The part of the vocabulary that `texts` need: with it they get the very tokens the whole one gives them."""
    made = merges_of(texts, ranks)

    def written(token: bytes) -> str:
        return base64.b64encode(token).decode()

    subset = {
        "pattern": PATTERN,
        "special": SPECIAL,
        "bytes": {written(bytes([value])): ranks[bytes([value])] for value in range(256)},
        "merges": [[*map(written, made[token]), ranks[token]] for token in sorted(made, key=ranks.__getitem__)],
    }
    lines = json.dumps(subset, ensure_ascii=False, separators=(",", ":"))
    (HERE / "o200k_subset.json").write_text(lines + "\n", encoding="utf-8")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--template", type=Path, required=True, help="the published chat template of GPT-OSS")
    template = load_template(arguments.parse_args().template)
    encoding = oh.load_harmony_encoding("HarmonyGptOss")
    texts: list[str] = []
    for path in sorted((HERE / "harmony").glob("*.json")):
        golden = json.loads(path.read_text(encoding="utf-8"))
        if "drawn" in golden:
            golden["library"] = [read_reply(encoding, text) for text in golden["drawn"]]
            texts += golden["drawn"]
        elif "schemas" in golden:
            golden["library"] = [declaration(encoding, schema) for schema in golden["schemas"]]
        else:
            conversation = library_conversation(golden["given"])
            tokens = close_calls(encoding.render_conversation_for_completion(conversation, oh.Role.ASSISTANT))
            golden["library"] = {"tokens": tokens, "text": encoding.decode(tokens)}
            try:
                golden["template"] = {"text": template_text(template, golden["given"])}
            except (TypeError, ValueError):
                golden["template"] = {"text": None}  # a schema or a call it cannot write
            texts += [encoding.decode(tokens), golden["template"]["text"] or ""]
        path.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    lines = (Path(os.environ["TIKTOKEN_ENCODINGS_BASE"]) / "o200k_base.tiktoken").read_bytes().split(b"\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    between = [part for text in texts for part in re.split(r"<\|\w+\|>", text)]
    write_subset([*texts, *between], ranks)


if __name__ == "__main__":
    main()
