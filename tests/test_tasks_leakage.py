"""Leaks between training and held-out tasks, found by words, by program, by embedding; and what is no leak."""

from __future__ import annotations

import os

import numpy as np
import pytest

from falconlib.memory.embed import HashedTfidf
from falconlib.records import Task
from falconlib.tasks import load_tasks
from falconlib.tasks.leakage import Leak, decontaminate, description, leaks, ngrams, shapes

LONG = "def f(xs):\n    out = []\n    for x in xs:\n        out.append(x + 1)\n    return out\n"
OTHER = "def g(items):\n    found = []\n    for item in items:\n        found.append(item + 1)\n    return found\n"
NUMBERS = "Find the third largest of the given whole numbers in the list."


def task(name, prompt, gold="def f():\n    return 1\n", **more):
    return Task(name, "t", "train", prompt, "f", ("assert f() == 1",), gold=gold, **more)


def never(texts):
    return np.zeros((len(texts), 4), dtype=np.float32)


def test_shared_words():
    held = [task("h/1", "Nothing alike."), task("h/2", f"Sorted input! {NUMBERS}"), task("h/3", NUMBERS)]
    near, far = task("a", f"Your job: {NUMBERS.upper()}"), task("b", " ".join(NUMBERS.split()[:7]))
    assert leaks([far, near], held, never) == [Leak("a", "h/2", "words", 8)]


def test_the_same_program_under_other_names():
    held = [task("h", "One.", OTHER)]
    assert leaks([task("a", "Two.", LONG)], held, never) == [Leak("a", "h", "program", 5)]
    assert leaks([task("a", "Two.", LONG.replace("x + 1", "x - 1"))], held, never) == []
    short = [task("h", "One.")], [task("a", "Two.", "def g():\n    return 1\n")]
    assert leaks(*short, never) == [] and [leak.reason for leak in leaks(*short, never, lines=1)] == ["program"]
    assert shapes("def (") == set()
    assert shapes("def f(a: int) -> int:\n    'Doc.'\n    return a") == shapes("def h(b):\n    return b")
    assert shapes("def f(a, b):\n    return a - b") != shapes("def f(a, b):\n    return b - a")


def test_near_embeddings():
    def encode(texts):
        angles = [{"One.": 0.0, "Two.": 0.4, "Three.": 0.5}[text] for text in texts]  # cos 0.4 = 0.92, cos 0.5 = 0.88
        return np.array([[np.cos(a), np.sin(a)] for a in angles], dtype=np.float32)

    (leak,) = leaks([task("a", "Two.", LONG), task("b", "Three.", LONG)], [task("h", "One.")], encode)
    assert (leak.task_id, leak.held_out, leak.reason) == ("a", "h", "embedding") and leak.value == pytest.approx(0.921, abs=1e-3)


def test_decontaminate_keeps_the_others_in_order_and_says_why():
    train = [task("a", "Alone."), task("b", NUMBERS, LONG), task("c", "Quite alone.")]
    kept, dropped = decontaminate(train, [task("h", NUMBERS, OTHER)], HashedTfidf().encode)
    assert [t.task_id for t in kept] == ["a", "c"]
    assert [(leak.task_id, leak.reason) for leak in dropped] == [("b", "words"), ("b", "program"), ("b", "embedding")]
    assert decontaminate(train, [], never) == (train, []) and leaks([], train, never) == []


def test_descriptions():
    assert description(task("a", "Write a python function to add.")).strip() == "add."
    header = 'import math\n\n\ndef f(x):\n    """ Round down. """\n'
    assert description(task("a", header, kind="completion")).strip() == "Round down."
    assert description(task("a", "def f(x):\n", kind="completion")) == "def f(x):\n"
    assert len(ngrams("A b c d e f g, H!", 8)) == 1 and ngrams("a b", 3) == set()


@pytest.mark.skipif(not os.environ.get("FALCON_DATA"), reason="FALCON_DATA is not set: no MBPP here")
def test_mbpp_repeats_itself():
    """A known flaw of the set: its training split has reworded twins in its evaluation splits."""
    mbpp = load_tasks("mbpp")
    found = leaks([t for t in mbpp if t.split == "train"], [t for t in mbpp if t.split != "train"], HashedTfidf().encode)
    assert Leak("mbpp/602", "mbpp/217", "words", 8) in found and len({leak.task_id for leak in found}) == 58
