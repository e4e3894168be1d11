"""The judge's process: holds the tests and expected values, runs the asserts, calls the candidate through a socket.

It is forked before it is given the tests, and writes one JSON record at the end. Standard library only.
"""

import importlib
import json
import operator
import reprlib

from falconlib.sandbox.candidate import describe, load
from falconlib.sandbox.codec import ProtocolError
from falconlib.sandbox.proxies import Died, Function, Peer
from falconlib.sandbox.rewrite import plan

MAX_RECORDS = 5000  # assertions recorded one by one
MAX_TEXTS = 500  # of them with what was expected and got: all must fit into the record
_OPS = {"Eq": operator.eq, "NotEq": operator.ne, "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt, "GtE": operator.ge,
        "Is": operator.is_, "IsNot": operator.is_not, "In": lambda a, b: a in b, "NotIn": lambda a, b: a not in b}  # fmt: skip
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 200
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = 20


class Refused(Exception):
    """These tests cannot be proxied."""


def show(value):
    """A short text for people."""
    try:
        return _repr.repr(value)[:500]
    except (ValueError, RecursionError, MemoryError):
        return f"<{type(value).__name__}>"


class Recorder:
    """Collects one record per executed assert. It is the `__site__` of the rewritten tests. runs: how often each of them runs
    with the gold program, None when nobody knows; then only those outside loops and branches have to run, once."""

    def __init__(self, todo, peer, runs):
        self.sites, self.peer, self.records, self.statuses = todo.sites, peer, [], set()
        self.gold, self.ran = bool(runs), [0] * len(todo.sites)
        self.due = runs or [int(s.straight and not s.constant) for s in todo.sites]
        self.planned = sum(self.due) if runs or not todo.dynamic else None
        self.idle, self.cut = 0, False  # asserts that ran before the program was asked; whether some were not recorded

    def __call__(self, number):
        return Attempt(self, self.sites[number])

    def add(self, site, snippet, status, info=None, texts=(None, None)):
        if site is not None:
            self.ran[site] += 1
            if self.gold and status == "pass" and self.ran[site] > self.due[site]:
                return  # longer answers earn no more
        if len(self.records) >= MAX_RECORDS and status in self.statuses:
            self.cut = True
            return
        self.statuses.add(status)
        info, texts = info or {}, texts if len(self.records) < MAX_TEXTS else (None, None)
        self.records.append({"snippet": snippet, "status": status, "error": info or None, "expected": texts[1], "got": texts[0]})

    def rest(self, snippets, status, info):
        """What snippets did not reach gets the status of what ended them."""
        for snippet in snippets:
            for number in [s.number for s in self.short() if s.snippet == snippet] or [None]:
                self.add(number, snippet, status, info)

    def told(self):
        """Its part of the judge's record. Where records were cut there should be as many as there are: the status holds for
        all. The runs matter where loops and branches decide them."""
        expected = len(self.records) if self.cut else self.planned and self.planned - self.idle
        return {"records": self.records, "expected": expected, "runs": [] if self.planned else self.ran}

    def unasked(self):
        return self.peer is not None and self.peer.count == 0

    def faulty(self, error):
        """Whether an error is the tests' own: nothing was asked yet, or it is of a kind that no answer causes."""
        theirs = isinstance(error, (Died, ProtocolError)) or hasattr(error, "candidate")
        return self.peer is not None and not theirs and (self.unasked() or isinstance(error, (ImportError, SystemExit)))

    def short(self):
        """The asserts that still have to run, each as often."""
        return [s for s, due, ran in zip(self.sites, self.due, self.ran, strict=True) for _ in range(due - ran)]


class Attempt:
    """One execution of one assert."""

    def __init__(self, recorder, site):
        self.recorder, self.site = recorder, site
        self.good, self.message, self.texts = False, None, (None, None)

    def compare(self, left, name, right):
        self.good = bool(_OPS[name](left, right))
        self.texts = show(left), show(right)
        return self.good

    def truth(self, value):
        self.good = bool(value)
        return self.good

    def explain(self, message):
        self.message = message

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        site = self.site
        if error is not None and self.recorder.faulty(error):
            return False
        if error is not None:
            self.recorder.add(site.number, site.snippet, *classify(error))
        elif self.recorder.unasked():  # it says nothing about the program
            if not self.good:
                raise AssertionError("an assert fails before the program is asked for anything")
            self.recorder.ran[site.number] += not site.constant
            self.recorder.idle += not site.constant
        elif not (site.constant and self.good):  # a constant that holds is no test
            info = None if self.message is None else {"message": show(self.message)}
            self.recorder.add(site.number, site.snippet, "pass" if self.good else "fail", info, self.texts)
        return True


def classify(error):
    """(status, error data) of an exception that ended an assert or a snippet."""
    if isinstance(error, Died):
        return "died", None
    if isinstance(error, ProtocolError):
        return "runtime_error", {"type": "ProtocolError", "message": str(error)}
    return placed(getattr(error, "candidate", None) or describe(error))  # lines of describe: where tests share the process


def placed(info):
    """Memory ran out, or the program said so."""
    return ("memory" if info["type"] == "MemoryError" and not info.get("raised") else "runtime_error"), info


def run(job, fd, write, retire):
    """Judges one program. job: {tests, setup, entry}; fd: socket of the candidate; write(bytes): where the record goes;
    retire(): called before tests run that might change this process. Returns (as clean as before, candidate hung up)."""
    try:
        todo = plan(job["setup"], job["tests"], job["entry"])
        if todo.in_process:
            raise Refused(todo.in_process)
    except (SyntaxError, ValueError, RecursionError, MemoryError, Refused) as error:
        told = {"refused": str(error)} if isinstance(error, Refused) else {"broken": f"{type(error).__name__}: {error}"}
        write(packed(told))
        return True, False
    if not todo.harmless:
        retire()
    peer = Peer(fd, todo.handles, write)
    recorder, result = Recorder(todo, peer, job["runs"]), {"loaded": False, "error": None, "broken": None}
    try:
        first = peer.receive()
        result["loaded"] = first.get("loaded") is True
        if not result["loaded"]:
            ended = classify(peer.revived(first.get("error")))
            result["error"] = ended[1]
    except (Died, ProtocolError) as error:
        ended = classify(error)
    if result["loaded"]:
        names = {n: Function(peer, n) for n in todo.names} | {"__inout__": inout, "__type__": type_of}
        result["broken"] = execute(todo, recorder, names)
    else:
        recorder.rest(range(len(todo.snippets)), *ended)
    lost = peer.dead or peer.violation is not None
    result |= {"waited": peer.waited, "candidate_eq": peer.candidate_eq, "inout": peer.inout, "lost": lost}
    write(packed(result | recorder.told()))
    clean = todo.harmless and not peer.violation and not any(r["status"] == "memory" for r in recorder.records)
    return clean, lost


def packed(record):
    """JSON that every decoder takes: texts of a program may hold lone surrogates."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")


def inout(function, *positions):
    """The callable of a bare statement `f(xs)` whose argument is read again."""
    if type(function) is not Function:
        return function
    return lambda *args, **kwargs: function._peer.ask(["name", function.__name__], args, kwargs, positions)


def type_of(value, *more):
    """What `type(value)` becomes in tests: no object of the program may answer for its class, asking it is an error."""
    value.__class__  # noqa: B018
    return type(value, *more)


def run_in_process(job, source, write):
    """Program and tests in this one process: for tests that cannot be proxied. A program can forge what is written here."""
    todo = plan(job["setup"], job["tests"], job["entry"])
    recorder = Recorder(todo, None, job["runs"])
    module, error = load(source, "solution")
    result = {"loaded": error is None, "error": error, "broken": None}
    if error is None:
        names = {**module.__dict__, "__inout__": lambda function, *positions: function, "__type__": type}
        result["broken"] = execute(todo, recorder, names)
    else:
        recorder.rest(range(len(todo.snippets)), *placed(error))
    write(packed(result | recorder.told()))


def execute(todo, recorder, names):
    """Setup, then each snippet, in one namespace. Returns what is wrong with the tests themselves, or None."""
    space = names | {m: importlib.import_module(m) for m in todo.modules}
    space.update({"__name__": "tests", "__site__": recorder})
    for i, code in enumerate((todo.setup, *todo.snippets), -1):
        try:
            exec(code, space)
        except BaseException as error:  # noqa: BLE001 - somebody's code
            if recorder.faulty(error):
                return f"{'setup' if i < 0 else f'test {i}'}: {type(error).__name__}: {error}"
            recorder.rest(range(len(todo.snippets)) if i < 0 else [i], *classify(error))
            if i < 0:
                return None
    missed = recorder.short() or [s for s in todo.sites if not (recorder.records or s.constant or recorder.ran[s.number])]
    for site in missed if not recorder.unasked() else ():  # the program's answers led past them: `for x in f(3): assert ...`
        recorder.add(site.number, site.snippet, "fail", {"message": "this assert was never reached, or not often enough"})
    return f"{len(missed)} asserts were never reached" if missed and recorder.unasked() else None
