"""JSON and chats, in the shapes that people export."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from sartor.data.document import Document


def read_json(text: str, path: Path) -> Iterator[Document]:
    yield from from_json(json.loads(text))


def read_jsonl(text: str, path: Path) -> Iterator[Document]:
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            yield from list(from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            yield Document("", lacking="malformed lines")


def from_json(value: Any) -> Iterator[Document]:
    """Chats in the shapes that people export, else every string of a value with at least two words."""
    if isinstance(value, dict) and isinstance(value.get("mapping"), dict):
        yield _chatgpt(value)
    elif isinstance(value, dict) and isinstance(value.get("chats"), dict):
        for chat in value["chats"].get("list", []):
            yield from _telegram(chat)
    elif isinstance(value, dict) and isinstance(value.get("messages"), list):
        messages = value["messages"]
        yield from _telegram(value) if any("date" in m and "text" in m for m in messages) else _roles(messages)
    elif (
        isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m and "content" in m for m in value)
    ):
        yield from _roles(value)
    elif isinstance(value, list):
        for item in value:
            yield from from_json(item)
    elif isinstance(value, str):
        yield Document(value)
    elif isinstance(value, dict):
        if "role" in value and "content" in value:
            yield from _roles([value])
        else:
            yield Document(
                "\n".join(s for s in _strings(value) if len(s.split()) > 1),
                _time(value.get("date") or value.get("timestamp")),
            )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _strings(v)
    elif isinstance(value, list):
        for v in value:
            yield from _strings(v)


def _flat(content: Any) -> str:
    """Content as people and exporters write it: a string, or a list of strings and {"text": ...}."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(
            c if isinstance(c, str) else str(c.get("text", "")) for c in content if isinstance(c, str | dict)
        )
    return ""


def _roles(messages: list[Any]) -> Iterator[Document]:
    yield Document("\n\n".join(f"{m['role']}: {_flat(m['content'])}" for m in messages if _flat(m.get("content"))))


def _chatgpt(conversation: dict[str, Any]) -> Document:
    nodes = [n["message"] for n in conversation["mapping"].values() if n.get("message")]
    nodes.sort(key=lambda m: m.get("create_time") or 0)
    lines = []
    for m in nodes:
        said = _flat(m.get("content", {}).get("parts", []))
        if said.strip() and m["author"]["role"] in {"user", "assistant"}:
            lines.append(f"{m['author']['role']}: {said}")
    return Document("\n\n".join(lines), _time(conversation.get("create_time")))


def _telegram(chat: dict[str, Any]) -> Iterator[Document]:
    said = [
        (str(m.get("date", "")), m)
        for m in chat["messages"]
        if m.get("type", "message") == "message" and _flat(m.get("text"))
    ]
    yield from _by_day((day[:10], f"{m.get('from') or 'me'}: {_flat(m['text'])}", _time(day)) for day, m in said)


def _by_day(lines: Iterator[tuple[str, str, float | None]]) -> Iterator[Document]:
    """A chat is cut into days: a day is a document."""
    days: dict[str, tuple[list[str], float | None]] = {}
    for day, line, when in lines:
        days.setdefault(day, ([], when))[0].append(line)
    for said, when in days.values():
        yield Document("\n".join(said), when)


WHATSAPP = re.compile(
    r"^\u200e?\[?(\d{1,4}[./-]\d{1,2}[./-]\d{2,4}),? \d{1,2}:\d{2}(?::\d{2})?(?:\s?[APap]\.?[Mm]\.?)?\]?(?: -)? (.*)$",
    re.M,
)
MOSTLY = 0.6  # of the dated lines
SAID = re.compile(r"([^:\n]{1,60}): (.*)", re.S)  # without a name in front, the program itself speaks
NOT_SAID = re.compile(
    r"\u200e.*|<[^<>\n]{1,60}>|(?:image|video|audio|sticker|gif|document|contact card|media) omitted", re.I | re.S
)
DAYS = (
    "%d/%m/%Y",
    "%d.%m.%Y",
    "%d/%m/%y",
    "%d.%m.%y",
    "%m/%d/%y",
    "%m/%d/%Y",
    "%Y-%m-%d",
    "%d-%m-%Y",
    "%Y/%m/%d",
    "%d-%m-%y",
)


def is_whatsapp(text: str) -> bool:
    """Whether a file begins with dated lines most of which somebody says: a diary's are not."""
    heads = list(itertools.islice(WHATSAPP.finditer(text[:20_000]), 50))
    said = sum(bool(SAID.fullmatch(h[2])) for h in heads)
    return bool(heads) and not text[: heads[0].start()].strip() and said > MOSTLY * len(heads)


def read_whatsapp(text: str, _: Path) -> Iterator[Document]:
    """A message goes on until the next one begins."""
    heads = list(WHATSAPP.finditer(text))
    ends = [h.start() for h in heads[1:]] + [len(text)]
    lines = []
    for head, end in zip(heads, ends, strict=True):
        said = SAID.fullmatch(text[head.start(2) : end].rstrip())
        if said and not NOT_SAID.fullmatch(said[2]):
            lines.append((head[1], f"{said[1]}: {said[2]}"))
        else:
            yield Document("", lacking="chat lines that nobody wrote")
    times = _dates([h[1] for h in heads])
    yield from _by_day((day, line, times.get(day)) for day, line in lines)


def _dates(days: list[str]) -> dict[str, float]:
    """All of one file's days in the one order of day, month and year that fits the most of them and, of several, the one in which they go forward."""

    def read(pattern: str) -> dict[str, float]:
        found = {}
        for day in dict.fromkeys(days):
            with contextlib.suppress(ValueError):
                found[day] = datetime.strptime(day, pattern).timestamp()
        return found

    def fitting(found: dict[str, float]) -> tuple[int, int]:
        times = list(found.values())
        return len(found), -sum(later < earlier for earlier, later in itertools.pairwise(times))

    return max(map(read, DAYS), key=fitting)


def _time(value: Any) -> float | None:
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            return None
    return None
