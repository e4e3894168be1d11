"""Pure text: task (+ recalled episodes) -> prompt; completion -> program; program -> training target.

The same rendering is used for training, memory and evaluation: the tokenizer's chat template (SmolLM2's adds a default
system prompt) and a prefilled code fence. Nothing here samples, runs or scores.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
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
BLOCK = re.compile(r"^[ \t]*```[\w+-]*[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


def extract_program(completion: str, prefix: str = "") -> str:
    """The program in a completion, `prefix` included.

    Text up to the first fence when it is code (the prefilled fence was open); else the first fenced block that defines
    a function, else the first block, else everything. A block that states the header of `prefix` again replaces it,
    with the imports and helpers of `prefix` kept in front. Line ends become "\\n"; tabs become four spaces only where
    they would clash with a prefix; otherwise the program is a substring of prefix + completion.
    """
    text = completion.replace("\r\n", "\n").replace("\r", "\n")
    body = text.split(FENCE, 1)[0]
    if body != text and not CODE_LINE.search(body):
        blocks = BLOCK.findall(text) or [body]
        body = next((b for b in blocks if re.search(r"^(?:def|class) ", b, re.MULTILINE)), blocks[0])
    return join(prefix, body.rstrip()) if prefix else body.rstrip().lstrip("\n")


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
    A program is shown whole or not at all. What does not fit goes in this order: the advice, then the program.
    """
    example = f"A similar task: {description.strip()}\n{OPEN}{program.strip()}\n{FENCE}" if program.strip() else ""
    warning = f"Avoid this error: {' '.join(advice.split())}" if advice.strip() else ""
    for parts in ((example, warning), (example,), (warning,)):
        text = "\n".join(part for part in parts if part)
        if text and len(tokenizer.encode(text, add_special_tokens=False)) <= max_tokens:
            return text
    return ""
