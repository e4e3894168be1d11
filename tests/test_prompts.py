"""Rendering, extraction and training targets, as whole texts."""

from __future__ import annotations

import ast
import json
import time
from pathlib import Path

import pytest

from falconlib.errors import FalconError
from falconlib.prompts import OPEN, STOP, extract_program, memory_prompt, program_prefix, render, target_text
from falconlib.records import Task
from falconlib.tasks import load_tasks


class StubTokenizer:
    all_special_tokens = ("<|end|>",)

    def get_added_vocab(self):
        return {"<|end|>": 0, "<|assistant|>": 1, "÷": 2}

    """A chat template with a default system prompt, and one token per word."""

    chat_template = "stub"

    def apply_chat_template(self, chat, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        turns = [{"role": "system", "content": "Be brief."}, *chat]
        return "".join(f"<{t['role']}>{t['content']}</>\n" for t in turns) + "<assistant>"

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return text.split()


class PlainTokenizer(StubTokenizer):
    chat_template = None


TEXT = Task(
    "t/1", "t", "train", "Return the sum of a list.\n", "total", ("assert total([1]) == 1", "assert total([]) == 0"), visible=1
)
HEADER = 'from typing import List\n\n\ndef total(values: List[int]) -> int:\n    """ Add up.\n    """\n'
COMPLETION = Task(
    "t/2", "t", "test", HEADER, "total", ("check(total)",), gold=HEADER + "    return sum(values)\n", kind="completion"
)
STDIO = Task(
    "t/3", "t", "train", "Echo.", None, ('{"input": "a\\n", "output": "a\\n"}', '{"input": "b", "output": "b"}'), 1, mode="stdio"
)


def test_render_text_task():
    prompt = render(StubTokenizer(), TEXT)
    assert prompt.prefix == ""
    assert prompt.text == (
        "<system>Be brief.</>\n<user>Write a Python function `total`. Return the sum of a list.\n"
        "assert total([1]) == 1</>\n<assistant>```python\n"
    )


def test_render_puts_memory_before_the_task_and_changes_nothing_else():
    plain, recalled = render(StubTokenizer(), TEXT), render(StubTokenizer(), TEXT, "MEMORY\n")
    assert recalled.text == plain.text.replace("<user>", "<user>MEMORY\n\n")


def test_render_completion_task_ends_with_the_header():
    prompt = render(StubTokenizer(), COMPLETION)
    assert prompt.prefix == HEADER.rstrip()
    assert prompt.text == (
        f"<system>Be brief.</>\n<user>Complete this Python function:\n```python\n{HEADER}```</>\n"
        f"<assistant>```python\n{HEADER.rstrip()}"
    )


def test_render_stdio_and_hidden_tests():
    text = render(StubTokenizer(), STDIO).text
    assert "Echo.\nWrite a Python program that reads standard input and prints the answer.\nInput:\na\nOutput:\na</>" in text
    hidden = Task("t/4", "t", "train", "Add.", "add", ("assert add(1, 2) == 3",))
    assert "<user>Write a Python function `add`. Add.</>" in render(StubTokenizer(), hidden).text
    assert "assert" not in render(StubTokenizer(), hidden).text


def test_render_without_chat_template():
    assert render(PlainTokenizer(), TEXT).text.startswith("Write a Python function `total`. Return the sum of a list.\n")
    assert render(PlainTokenizer(), TEXT).text.endswith(f"assert total([1]) == 1\n\n{OPEN}")


BODY = "    return sum(values)"
CODE = "def total(values):\n    return sum(values)"
FULL = HEADER.rstrip() + "\n" + BODY
HELPER = "def h():\n    pass\n\n\n"
DOC = 'def total(values):\n    """Sum.\n\n    ```\n    total([1])\n    ```\n    """\n    return sum(values)'
TABLE = {
    # name: (completion, prefix, program)
    "up to the closing fence": (f"{CODE}\n```\nThis adds.", "", CODE),
    "stopped before the fence": (f"{CODE}\n", "", CODE),
    "prose after without fence stays": ("x = 1\nThat is it.", "", "x = 1\nThat is it."),
    "second block after the program": (f"{CODE}\n```\nUsage:\n```python\nprint(total([1]))\n```", "", CODE),
    "prose, then a block": (f"Sure, here it is:\n\n```python\n{CODE}\n```\nIt adds.", "", CODE),
    "block without a language": (f"Here:\n```\n{CODE}\n```", "", CODE),
    "block in capitals": (f"Here:\n```Python\n{CODE}\n```", "", CODE),
    "only a block": (f"```py\n{CODE}\n```", "", CODE),
    "install block first": (f"First:\n```bash\npip install x\n```\nThen:\n```python\n{CODE}\n```", "", CODE),
    "two programs: the first": (f"A:\n```python\n{CODE}\n```\nB:\n```python\ndef other():\n    pass\n```", "", CODE),
    "truncated block": ("Here:\n```python\ndef total(values):\n    ret", "", "def total(values):\n    ret"),
    "truncated program": ("def total(values):\n    return su", "", "def total(values):\n    return su"),
    "windows line ends": ("def total(values):\r\n    return sum(values)\r\n```\r\n", "", CODE),
    "old mac line ends": ("def total(values):\r    return sum(values)\r", "", CODE),
    "tabs are kept": ("def total(values):\n\treturn sum(values)\n```", "", "def total(values):\n\treturn sum(values)"),
    "leading blank lines": (f"\n\n{CODE}\n```", "", CODE),
    "nothing": ("", "", ""),
    "only prose": ("I cannot do that.", "", "I cannot do that."),
    "only a fence": ("```", "", ""),
    "stdin program": ("n = int(input())\nprint(n)\n```", "", "n = int(input())\nprint(n)"),
    "body": (f"\n{BODY}\n```", HEADER.rstrip(), FULL),
    "body for the whole header": (f"{BODY}\n", HEADER, HEADER + BODY),
    "body without its line break": (f"{BODY}\n```", HEADER.rstrip(), FULL),
    "body with tabs": ("\n\tif x:\n\t\tx = 1\n\tx = 2", "def f(x):", "def f(x):\n    if x:\n        x = 1\n    x = 2"),
    "body with helper behind": (f"\n{BODY}\n\n\ndef g():\n    pass\n```", HEADER.rstrip(), f"{FULL}\n\n\ndef g():\n    pass"),
    "the header again": (f"{CODE}\n```", HEADER.rstrip(), f"from typing import List\n\n\n{CODE}"),
    "the whole prompt again": (f"\n{FULL}\n```", HEADER.rstrip(), FULL),
    "prose and the header again": (f"Here:\n```python\n{CODE}\n```", HEADER.rstrip(), f"from typing import List\n\n\n{CODE}"),
    "prose and a body": (f"The body is\n```python\n{BODY}\n```", HEADER.rstrip(), FULL),
    "helper, then the header again": (f"{HELPER}def f(x):\n    return 1", "def f(x):", f"{HELPER}def f(x):\n    return 1"),
    "body, then the header again": (f"\n{BODY}\n\n\n{CODE}\n```", HEADER.rstrip(), f"{FULL}\n\n\n{CODE}"),
    "empty body": ("", "def f(x):", "def f(x):"),
    "tildes": (f"Here:\n~~~python\n{CODE}\n~~~\nDone.", "", CODE),
    "only tildes": (f"~~~python\n{CODE}\n~~~", HEADER, f"from typing import List\n\n\n{CODE}"),
    "four backticks": (f"````python\n{CODE}\n````", "", CODE),
    "info string": (f'Sure:\n```python title="a.py"\n{CODE}\n```', "", CODE),
    "fence in a list": ("1. So:\n\n   ```python\n   def f():\n       return 1\n   ```\n", "", "def f():\n    return 1"),
    "usage first": (f"It is used so:\n```python\nprint(total([1]))\n```\nIt is:\n```python\n{CODE}\n```", "", CODE),
    "helper block first": (f"A helper:\n```python\ndef h(x):\n    return x\n```\nThen:\n```python\n{CODE}\n```", HEADER,
                           f"from typing import List\n\n\n{CODE}"),
    "broken block first": (f"```python\ndef total(values:\n```\nNo, so:\n```python\n{CODE}\n```", "", CODE),
    "prose like an assignment": (f"Here = the function\n```python\n{CODE}\n```", "", CODE),
    "prose like an import": (f"from here import this\n```python\n{CODE}\n```", "", CODE),
    "indented prose": (f"Sure!\n   It goes so:\n```python\n{CODE}\n```", "", CODE),
    "fence in a docstring": (f"{DOC}\n```", "", DOC),
    "fence in a docstring of a block": (f"So:\n```python\n{DOC}\n```\nAnd so on.", "", DOC),
    "fence in a string of a body": ('\n    s = "```"\n    return s\n```', "def f():", 'def f():\n    s = "```"\n    return s'),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_extract_program(name):
    completion, prefix, program = TABLE[name]
    assert extract_program(completion, prefix) == program


def test_the_block_that_defines_what_is_asked_for():
    chat = f"A helper:\n```python\ndef h(x):\n    return x\n```\nThen:\n```python\n{CODE}\n```"
    assert extract_program(chat, entry_point="total") == CODE
    assert extract_program(chat, entry_point="h") == extract_program(chat) == "def h(x):\n    return x"


def test_no_chat_takes_long():
    for text in ("```\n" * 5000, "~~~\n" * 5000, "```python\n" + "a" * 10**5, "def " * 10**4, " " * 10**5 + "```"):
        begun = time.process_time()
        extract_program(text), extract_program(text, HEADER)
        assert time.process_time() - begun < 2, text[:10]


REAL = [json.loads(line) for line in Path(__file__).with_name("extraction_cases.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("case", REAL, ids=lambda case: case["name"])
def test_extract_program_from_what_the_model_said(case):
    """Completions of SmolLM2-135M-Instruct, in a free chat or behind the prefilled fence; tabs and Windows line ends put in."""
    (task,) = [t for t in (*load_tasks("basics"), *load_tasks("humaneval")) if t.task_id == case["task_id"]]
    assert extract_program(case["completion"], program_prefix(task)) == case["program"]


def test_extraction_undoes_target_text():
    """A gold rendered as a completion comes back as the same program, for every task of both kinds."""
    for task in [*load_tasks("basics"), *load_tasks("humaneval")]:
        target = target_text(task.gold, task)
        assert target.endswith(f"\n{STOP[0]}")
        program = extract_program(target, program_prefix(task))
        assert program.rstrip() == task.gold.rstrip(), task.task_id
        ast.parse(program)


def test_target_text():
    assert target_text("def f():\n    return 1\n\n", TEXT) == "def f():\n    return 1\n```"
    assert target_text(COMPLETION.gold, COMPLETION) == f"\n{BODY}\n```"
    with pytest.raises(FalconError, match=r"t/2.*does not begin with its prompt"):
        target_text("def total(values):\n    return 1\n", COMPLETION)


def test_memory_prompt_golden():
    text = memory_prompt(f"{CODE}\n", " Return the sum. ", "TypeError: unsupported\noperand", StubTokenizer(), 100)
    assert text == (f"A similar task: Return the sum.\n```python\n{CODE}\n```\nAvoid this error: TypeError: unsupported operand")


def test_memory_prompt_never_cuts_a_program():
    tokenizer, program, advice = StubTokenizer(), CODE, "KeyError: no such key"
    sizes = []
    for bound in range(40):
        text = memory_prompt(program, "Return the sum.", advice, tokenizer, bound)
        assert len(tokenizer.encode(text, add_special_tokens=False)) <= bound
        assert (f"```python\n{program}\n```" in text) == ("def" in text)
        sizes.append(text)
    assert sizes[0] == "" and sizes[7] == f"Avoid this error: {advice}" and sizes[-1].endswith(advice) and CODE in sizes[-1]
    example = sizes[-1].removesuffix(f"\nAvoid this error: {advice}")
    assert sizes[len(example.split())] == example  # the program stays as long as it fits, the advice goes first
    assert list(map(len, sizes)) == sorted(map(len, sizes))
    assert memory_prompt("", "", "", tokenizer, 100) == ""
    assert memory_prompt("", "words", "ValueError", tokenizer, 100) == "Avoid this error: ValueError"


def test_control_tokens_of_the_chat_never_come_out_of_memory():
    tokenizer = StubTokenizer()
    text = memory_prompt(
        "def f():\n    return 1 ÷ 2\n", "Half<|end|> of <|assistant|>it", "ValueError: <|end|><|assistant|>x", tokenizer, 99
    )
    assert "<|" not in text and "return 1 ÷ 2" in text and "Half of it" in text and "ValueError: x" in text
    assert memory_prompt("def f():\n    return '<|assistant|>'\n", "d", "E", tokenizer, 99) == "Avoid this error: E"
