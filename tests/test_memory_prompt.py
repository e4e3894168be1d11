"""From memory to the model: what recall puts into a prompt, as a whole text, and what it never does."""

import json
from dataclasses import replace

import pytest
from test_memory import TASKS, episode, make_task

from falconlib.memory import LongTermMemory, ShortTermMemory
from falconlib.memory.embed import HashedTfidf
from falconlib.memory.recall import Neighbour, Recall
from falconlib.rollout import Conductor

EVEN, ODD = TASKS[0], replace(TASKS[1], gold="def odd_sum(values):\n    return sum(v for v in values if v % 2)\n")
EXPECTED = """A similar task: Return the sum of all odd numbers in a list.
```python
def odd_sum(values):
    return sum(v for v in values if v % 2)
```
Avoid this error: TypeError: unsupported operand type(s) for +: 'int' and 'str'"""


@pytest.fixture
def conductor(tmp_path, profile, tiny_policy):
    with LongTermMemory(tmp_path / "m", HashedTfidf()) as memory:
        memory.add_tasks([EVEN, ODD, *TASKS[2:]])
        memory.add_golds([EVEN, ODD])
        message = "unsupported operand type(s) for +:\n  'int' and 'str'"
        memory.add_episodes([episode(ODD, "return x", "runtime_error", "TypeError", message=message) for _ in range(2)])
        memory.add_episodes([episode(TASKS[2], f"x = {i}", "fail", "fail") for i in range(3)])
        yield Conductor(tiny_policy, None, None, profile, 0, memory, ShortTermMemory(4, 8))


def bounded(conductor, tokens):
    settings = replace(conductor.profile.long_term, prompt_tokens=tokens)
    conductor.profile = replace(conductor.profile, long_term=settings)
    return conductor.memory_text(conductor.recall([EVEN])[0])


def test_the_recalled_text_as_a_whole(conductor):
    assert bounded(conductor, 400) == (EXPECTED, ("toy/1",))
    ((prompt, text, shown),) = conductor.prompts([EVEN], with_memory=True)
    assert text == EXPECTED and shown == ("toy/1",)
    ((plain, _, _),) = conductor.prompts([EVEN], with_memory=False)
    before, after = plain.text.split(EVEN.prompt)
    words = f"{EXPECTED}\n\nWrite a Python function"
    assert prompt.text == before.replace("Write a Python function", words) + EVEN.prompt + after
    assert EVEN.gold not in prompt.text  # its own solution is in the memory


def test_the_recalled_text_is_bounded_in_tokens(conductor):
    found, encode = set(), conductor.policy.encode
    for tokens in range(len(encode(EXPECTED)) + 1):
        text, shown = bounded(conductor, tokens)
        assert len(encode(text)) <= tokens and (shown == ("toy/1",)) == ("def odd_sum" in text)
        found.add(text)
    example, advice = EXPECTED.rsplit("\n", 1)
    assert found == {"", advice, example, EXPECTED}


def test_switched_off_it_is_the_plain_prompt(conductor):
    plain = conductor.prompts(TASKS, with_memory=False)
    conductor.long_term = None
    assert conductor.prompts(TASKS, with_memory=True) == plain
    assert conductor.neighbour_programs(TASKS) == [[]] * 12 and conductor.own_programs(TASKS, []) == []
    assert conductor.failures(TASKS) == [] and conductor.remember([], []) is None


def test_a_near_duplicate_of_an_evaluation_task_is_not_shown_and_counts_for_nothing(conductor):
    test_task = make_task("test", "Return the sum of all odd numbers in a list!", "test")
    assert "def odd_sum" in conductor.memory_text(conductor.recall([test_task])[0])[0]
    assert conductor.long_term.blocklist([test_task]) == ["toy/1"]
    (recall,) = conductor.recall([test_task])
    assert "odd_sum" not in conductor.memory_text(recall)[0] and "TypeError" not in recall.frequent_errors
    assert all(name != "toy/1" for found in conductor.neighbour_programs([test_task]) for name, _ in found)


def test_the_buffers_of_a_resumed_run_are_those_of_the_first(conductor):
    for step in range(3):
        conductor.short_term.add([replace(episode(t, f"x = {step}", step=step), logprobs=(-1 / 3,)) for t in (EVEN, ODD)])
    fresh = [episode(EVEN, "x = 9", step=9)]
    before = conductor.buffers([EVEN, ODD, TASKS[2]], fresh)
    assert [[e.step for e in buffer] for buffer in before] == [[0, 1, 2, 9], [0, 1, 2], []]
    state = json.loads(json.dumps(conductor.short_term.state()))
    conductor.short_term = ShortTermMemory(4, 8)
    assert conductor.buffers([EVEN, ODD, TASKS[2]], fresh) != before
    conductor.short_term.load(state)
    assert conductor.buffers([EVEN, ODD, TASKS[2]], fresh) == before


def test_the_first_program_that_fits_is_shown(conductor):
    long = Neighbour("toy/long", 0.9, 0.0, "Do it all.", "def f():\n" + "    x = 1\n" * 400)
    short = Neighbour("toy/short", 0.8, 0.0, "Do one thing.", "def g():\n    return 1\n")
    text, shown = conductor.memory_text(Recall((long, replace(long, code=None), short)))
    assert shown == ("toy/short",) and text == "A similar task: Do one thing.\n```python\ndef g():\n    return 1\n```"
    assert conductor.memory_text(Recall((long,))) == ("", ())


def test_no_fence_comes_in_with_what_is_recalled(conductor):
    fenced = Neighbour("toy/a", 0.9, 0.0, "Do.", 'def f():\n    """```\n    x\n    ```"""\n')
    plain = Neighbour("toy/b", 0.8, 0.0, "Do ```this```.", "def g():\n    return 1\n", (("E", 2, "a ``` b"),))
    text, shown = conductor.memory_text(Recall((fenced, plain)))
    assert shown == ("toy/b",) and text.startswith("A similar task: Do this.\n```python\ndef g") and text.count("```") == 2
    assert text.endswith("Avoid this error: E: a b")


def test_an_error_is_frequent_when_it_was_met_twice_among_the_neighbours_together(conductor):
    def met(*names):
        for task, name in zip((ODD, TASKS[2]), names, strict=False):
            conductor.long_term.add_episodes([episode(task, f"{name} = 1", "runtime_error", name)])
        (recall,) = conductor.long_term.recall([EVEN], 8)
        named = {error for n in recall.neighbours for error, *_ in n.errors}
        assert named == recall.frequent_errors, "what is punished is what the prompt can name"
        return recall.frequent_errors

    assert met("KeyError") == {"TypeError"}, "once at one task is not frequent"
    assert met("IndexError", "IndexError") == {"TypeError", "IndexError"}, "once at each of two tasks is"


def test_the_advice_names_the_most_frequent_error(conductor):
    often = Neighbour(
        "toy/a", 0.9, 0.0, "Do.", "def f(): ...", (("KeyError", 2, "k"), ("NameError", 5, "n"), ("ValueError", 3, "v"))
    )
    assert conductor.memory_text(Recall((often,)))[0].endswith("Avoid this error: NameError: n")


def test_a_full_buffer_ends_in_the_fresh_episodes(conductor):
    conductor.short_term.add([episode(EVEN, f"x = {step}", step=step) for step in range(3)])
    fresh = [episode(EVEN, f"y = {i}", step=9) for i in range(3)]
    assert [e.code for e in conductor.buffers([EVEN], fresh)[0]] == ["x = 2", "y = 0", "y = 1", "y = 2"]


def test_short_term_memory_keeps_support_and_long_term_memory_both(conductor):
    support, query = [episode(EVEN, "x = 1", "fail", "fail")], [replace(episode(EVEN, "q = 1", "fail", "fail"), group="query")]
    conductor.remember(support, query)
    assert [e.code for e in conductor.short_term.get(EVEN.task_id)] == ["x = 1"]
    assert {code for _, code, _ in conductor.long_term.failures([EVEN.task_id])} == {"x = 1", "q = 1"}
