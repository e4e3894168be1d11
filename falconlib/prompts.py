"""Pure text: task (+ recalled episodes) -> prompt; completion -> program; program -> training target.

The same rendering is used for training, memory and evaluation: the tokenizer's chat template (SmolLM2's adds a default
system prompt) and a prefilled code fence. Nothing here samples, runs or scores.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
import warnings
from dataclasses import dataclass
from itertools import islice
from typing import Any

from falconlib.errors import FalconError
from falconlib.records import Task

FENCE = "```"
OPEN = "```python\n"
STOP = (FENCE,)  # a sampled completion ends at the closing fence


@dataclass(frozen=True)
class Prompt:
    """text: what the model continues. prefix: the part of the program that `text` holds already ("" for kind "text")."""

    text: str
    prefix: str


def render(tokenizer: Any, task: Task, memory_text: str = "") -> Prompt:
    """Prompt of `task`; `memory_text` (see `memory_prompt`), when not empty, comes before the task in the user's message.

    tokenizer: anything with `apply_chat_template`; one without a chat template gets the bare message.
    """
    message = "\n\n".join(part for part in (memory_text.strip("\n"), user_message(task)) if part)
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": message}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    else:
        text = f"{message}\n\n"
    prefix = program_prefix(task)
    return Prompt(f"{text}{OPEN}{prefix}", prefix)


def user_message(task: Task) -> str:
    """The task in words: required name, description, shown tests; for kind "completion" the header to be completed.

    Of five wordings tried on 90 `basics` tasks (greedy, SmolLM2-135M) this one ended most often within 64 tokens (84 times,
    the others 63 to 79) with the fewest syntax errors (7; 10 to 22) and passed 8 (5 to 7, within noise).
    """
    if task.kind == "completion":
        return f"Complete this Python function:\n{OPEN}{task.prompt.rstrip()}\n{FENCE}"
    shown = task.tests[: task.visible]
    if task.mode == "stdio":
        examples = [json.loads(test) for test in shown]
        lines = [f"Input:\n{e['input'].rstrip()}\nOutput:\n{e['output'].rstrip()}" for e in examples]
        rule = "Write a Python program that reads standard input and prints the answer."
        return "\n".join([task.prompt.rstrip(), rule, *lines])
    required = f"Write a Python function `{task.entry_point}`. " if task.entry_point else ""
    return "\n".join([required + task.prompt.rstrip(), *shown])


def program_prefix(task: Task) -> str:
    """What the prefill holds of the program. Trailing blanks are left to the model, whose tokens join a line break to the
    indentation behind it: of 30 HumanEval tasks SmolLM2-135M passes 4 without and 0 with the last line break (greedy).
    """
    return task.prompt.rstrip() if task.kind == "completion" else ""


def target_text(code: str, task: Task) -> str:
    """The completion that a gold or verified program `code` of `task` would be, closing fence included (for cross-entropy).

    Raises FalconError when `code` of a completion task does not begin with the prompt's header.
    """
    prefix = program_prefix(task)
    if not code.startswith(prefix):
        raise FalconError(
            f"the program for {task.task_id!r} does not begin with its prompt", "keep only programs that continue the prompt"
        )
    return f"{code[len(prefix) :].rstrip()}\n{FENCE}"


CODE_LINE = re.compile(r"^(?:def \w+\(|class \w+|import \w|from \S+ import |@\w|[ \t]+\S|\w+(?:, \w+)* = |print\()", re.MULTILINE)
OPENING = re.compile(r"^([ \t]*)(`{3,}|~{3,})[^`\n]*\n", re.MULTILINE)
CUTS = 16  # at most so many fences are looked at, and so many ends of a block: no chat has more


def extract_program(completion: str, prefix: str = "", entry_point: str | None = None) -> str:
    """The program in a completion, `prefix` included.

    Without a fence: everything. Else the best of the text up to the first fence, when that is code (the prefilled fence was
    open), and of the fenced blocks: one that continues `prefix`, or defines `entry_point` (None: the last function of
    `prefix`, or anything); one without syntax errors before one with them, an early one before a late one.
    A fence in a string ends nothing. A block that states the header of `prefix` again replaces it, with the imports and
    helpers of `prefix` kept in front. Line ends become "\\n"; a block loses the indentation of its fence; tabs become four
    spaces only where they would clash with a prefix; otherwise the program is a substring of prefix + completion.
    """
    text = completion.replace("\r\n", "\n").replace("\r", "\n")
    header = re.findall(r"^(?:async )?def (\w+)", prefix, re.MULTILINE)
    name = re.escape(entry_point or "".join(header[-1:]))
    asked = re.compile(rf"^(?:(?:async )?def|class) +{name or '[^ ]+'} *[(:]" + f"|^{name} = " * bool(name), re.MULTILINE)

    def rank(body: str) -> tuple[bool, bool, bool, bool]:
        suits = bool(asked.search(body) or (prefix and body.lstrip("\n")[:1] in (" ", "\t")))
        good = parses(join(prefix, body))
        return suits and good, suits, bool(re.search(r"^(?:def|class) ", body, re.MULTILINE)), good

    fences = [m.start() for m in islice(re.finditer(rf"{FENCE}|^[ \t]*~~~", text, re.MULTILINE), CUTS)]
    body = text[: end(prefix, text, 0, fences)]
    if fences:
        head = [body] if CODE_LINE.search(body) and any(rank(body)) else []  # prose may look like code
        body = max([*head, *blocks(prefix, text)] or [body], key=rank)
    return join(prefix, body.rstrip()) if prefix else body.rstrip().lstrip("\n")


def blocks(prefix: str, text: str) -> list[str]:
    """The contents of the fenced blocks, of backticks or tildes, without the indentation of the fence."""
    found: list[str] = []
    place = 0
    while len(found) < CUTS and (opening := OPENING.search(text, place)):
        closings = re.compile(rf"^[ \t]*{opening[2]}[^\n]*", re.MULTILINE).finditer(text, opening.end())
        place = end(prefix, text, opening.end(), [m.start() for m in islice(closings, CUTS)])
        found.append(re.sub(f"^{opening[1]}", "", text[opening.end() : place], flags=re.MULTILINE))
        place = text.find("\n", place) + 1 or len(text)
    return found


def end(prefix: str, text: str, start: int, fences: list[int]) -> int:
    """Where the program that begins at `start` ends: at the last of the fences or the end of the text before which there is
    no syntax error (then the fences before it stand in strings), else at the first."""
    ends = [*fences, len(text)]
    for place in reversed(ends) if fences else ():
        code = textwrap.dedent(text[start:place]) if start else text[:place]
        if parses(join(prefix, code)) and not re.search(r"^~~~+\w", code, re.MULTILINE):  # to Python `~~~python` is an expression
            return place
    return ends[0]


def parses(code: str) -> bool:
    """Whether Python's grammar accepts the program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the program's own odd escapes are none of our business
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def join(prefix: str, body: str) -> str:
    """prefix + body; a body that states the prefix's last function again takes its place."""
    if "\t" in body and "\t" not in prefix:
        body = re.sub(r"^[ \t]+", lambda m: m[0].replace("\t", "    "), body, flags=re.MULTILINE)
    fresh = body.lstrip("\n")
    header = list(re.finditer(r"^(?:async )?def (\w+)", prefix, re.MULTILINE))
    if header and not fresh[:1].isspace() and re.search(rf"^(?:async )?def {header[-1][1]}\b", fresh, re.MULTILINE):
        before = prefix[: header[-1].start()]
        return fresh if fresh.startswith(before.strip()) else before + fresh
    indented_at_once = body[:1] in (" ", "\t") and not prefix.endswith("\n")
    return prefix + ("\n" if indented_at_once else "") + body


def memory_prompt(program: str, description: str, advice: str, tokenizer: Any, max_tokens: int) -> str:
    """Text of one verified neighbour program and of the error that is frequent near it, at most `max_tokens` tokens long.

    program: source that passed its tests ("" for none). description: of its task. advice: one line ("" for none).
    A program is shown whole or not at all, and not with a fence or one of the tokenizer's control tokens in it (it could end
    the turn); from the other texts they are taken out. What does not fit goes in this order: the advice, then the program.
    """
    control = {word for word in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()) if len(word) > 1}  # not "÷"
    forbidden = (FENCE, *sorted(control, key=lambda word: (-len(word), word)))
    for word in forbidden:
        description, advice = description.replace(word, ""), advice.replace(word, "")
    example = f"A similar task: {description.strip()}\n{OPEN}{program.strip()}\n{FENCE}" if program.strip() else ""
    example = "" if any(word in program for word in forbidden) else example
    warning = f"Avoid this error: {' '.join(advice.split())}" if advice.strip() else ""
    for parts in ((example, warning), (example,), (warning,)):
        text = "\n".join(part for part in parts if part)
        if text and len(tokenizer.encode(text, add_special_tokens=False)) <= max_tokens:
            return text
    return ""
