"""The candidate as the judge sees it: its functions, its objects, its errors. Standard library only.

A call becomes a frame on the socket; what comes back is plain data, an object that stays with the candidate (Handle, only
where the tests use a result as an object), or an Opaque value that fails on any use.

What a pass may rest on in value mode: plain data, what calling an object returned, and what the tests name themselves: an
instance of a class (a capital letter) or `name.attribute`, with its attributes, methods, items and sums (level 2), and of what
its methods return such attributes as no builtin type has (level 1). The program's own word is the rest, `candidate_eq`: every
comparison and truth of an object, a number that an operator made of a value of the test (`abs(x - 5) < 1e-6`), and whatever the
return value of a function says of itself (level 0).
"""

import builtins
import contextlib
import operator
import time

from falconlib.sandbox.codec import Encoder, ProtocolError, builtin_name, decode, receive, send
from falconlib.sandbox.rewrite import COMMON

_RAISABLE = {k: v for k, v in vars(builtins).items() if isinstance(v, type) and issubclass(v, Exception)}
for _name in ("StopIteration", "StopAsyncIteration"):  # would end a map() or a loop of the test as if nothing were wrong
    del _RAISABLE[_name]


class Died(BaseException):
    """The candidate's process is gone: by a limit, a signal, or by itself. No `except Exception` of a test catches it."""


class CandidateError(Exception):
    """An exception of a class that the judge does not know."""


class Opaque:
    """A value that did not travel. Any use of it is an error of the program, asking for its class or attributes included."""

    def __init__(self, kind):
        object.__setattr__(self, "kind", kind)

    def __fail(self, *args):
        raise TypeError(f"unsupported return type {object.__getattribute__(self, 'kind')[:100]!r}")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __len__ = __iter__ = __getitem__ = __call__ = __fail
    __contains__ = __hash__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __abs__ = __float__ = __int__ = __str__ = __fail
    __getattribute__ = __setattr__ = __fail

    def __repr__(self):
        return f"<{object.__getattribute__(self, 'kind')[:100]} object>"


class Handle:
    """An object that stays with the candidate; what is done to it happens there."""

    def __init__(self, peer, number, named):
        self.__dict__.update(_peer=peer, _number=number, _named=named)

    def __getattr__(self, name):
        self._peer.candidate_eq |= self._named < (2 if name in COMMON else 1)
        return self._peer.ask(["op", "getattr"], (self, name))

    def __setattr__(self, name, value):
        self._peer.ask(["op", "setattr"], (self, name, value))

    def __call__(self, *args, **kwargs):
        return self._peer.ask(["op", "call"], (self, *args), kwargs)

    def __repr__(self):
        return "<candidate object>"

    @property  # type: ignore[misc]
    def __class__(self):  # what isinstance() reads: this one has the methods of everything, and would be taken for it
        raise TypeError("the class of a program's object is known to the program only")


def _forward(name, judged):
    def method(self, *args):
        result = self._peer.ask(["op", name], (self, *args))
        number = name in _ARITHMETIC and type(result) is not Handle and any(type(a) is not Handle for a in args)
        self._peer.candidate_eq |= judged or number or self._named < 2
        return result

    return method


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "contains")
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "abs")
for _name in (*_COMPARISONS, "hash"):
    setattr(Handle, f"__{_name}__", _forward(_name, True))
Handle.__bool__ = _forward("truth", True)  # type: ignore[attr-defined]
for _name in (*_ARITHMETIC, "len", "iter", "str", "getitem", "setitem"):
    setattr(Handle, f"__{_name}__", _forward(_name, False))


class Function:
    """A name of the candidate: its function, class or global value."""

    def __init__(self, peer, name):
        self.__dict__.update(_peer=peer, __name__=name)

    def __call__(self, *args, **kwargs):
        return self._peer.ask(["name", self.__name__], args, kwargs)

    def __getattr__(self, name):
        return getattr(self._peer.ask(["value", self.__name__], ()), name)


def _resolved(operation):
    """A global value is asked for when it is used, not taken for the name."""
    return lambda self, *args: operation(self._peer.ask(["value", self.__name__], ()), *args)


for _name in (*_COMPARISONS, *_ARITHMETIC, "getitem", "bool", "len", "iter", "str"):
    setattr(Function, f"__{_name}__", _resolved(getattr(operator, _name, None) or getattr(builtins, _name)))


class Peer:
    """The candidate as seen from here. handles: names whose results may stay there. `mark` gets b"*" when a value has arrived
    and b"?" when another one is awaited. waited: seconds spent waiting for it."""

    def __init__(self, fd, handles, mark):
        self.fd, self.handles, self.mark, self.answered, self.waited = fd, handles, mark, False, 0.0
        self.count, self.dead, self.violation, self.functions = 0, False, None, []
        self.candidate_eq = self.inout = self.keep = False
        self.named = 0

    def receive(self):
        if self.violation:
            raise ProtocolError(self.violation)
        if self.dead:
            raise Died
        start = time.monotonic()
        try:
            message = receive(self.fd)
        except ProtocolError as error:
            self.violation = str(error)
            raise
        finally:
            self.waited += time.monotonic() - start
        if message is None:
            self.dead = True
            raise Died
        return message

    def ask(self, target, args, kwargs=None, inout=()):
        self.count += 1
        kind, name = target
        keep = kind == "op" or name in self.handles
        request = {"id": self.count, "target": target, "keep": keep, "inout": list(inout)}
        request |= {"args": [self.encode(a) for a in args], "kwargs": {k: self.encode(v) for k, v in (kwargs or {}).items()}}
        if self.answered:
            self.mark(b"?")
        try:
            if not (self.dead or self.violation):
                send(self.fd, request)
        except OSError:
            pass  # the next read says that it is gone
        while "callback" in (reply := self.receive()):
            self.callback(reply)
        self.answered = True
        self.mark(b"*")
        if type(reply.get("id")) is not int or reply["id"] != self.count or not ("error" in reply) ^ ("value" in reply):
            self.violation = "answer to another question"
            raise ProtocolError(self.violation)
        level = args[0]._named if kind == "op" else 2 * (kind == "value" or name[:1].isupper())
        self.keep, self.named = keep, min(level, 1) if (kind, name) == ("op", "call") else level
        if "error" in reply:
            raise self.revived(reply["error"])
        for position, value in zip(inout, map(self.decode, reply.get("inout", ())), strict=True):
            self.inout = True
            copy_back(args[position], value)
        return self.decode(reply["value"])

    def revived(self, info):
        try:
            return revive(info)
        except (ValueError, TypeError, LookupError):
            raise ProtocolError("malformed error") from None

    def callback(self, reply):
        """A function of the test that the candidate calls."""
        try:
            value = self.functions[reply["callback"]](*[self.decode(a) for a in reply["args"]])
            answer = {"value": self.encode(value)}
        except (ProtocolError, LookupError):
            raise ProtocolError("malformed callback") from None
        except Exception as error:  # noqa: BLE001 - the test's function failed; its caller is told
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        with contextlib.suppress(OSError):  # the next read says that it is gone
            send(self.fd, answer)

    def encode(self, value):
        return Encoder(self.reference)(value)

    def reference(self, value):
        if type(value) is Handle:
            return {"t": "ref", "v": value._number}
        if type(value) is Function:
            return {"t": "name", "v": value.__name__}
        if type(value) is Opaque:
            bool(value)
        if name := builtin_name(value):
            return {"t": "builtin", "v": name}
        if callable(value):
            self.functions.append(value)
            return {"t": "fn", "v": len(self.functions) - 1}
        return None

    def decode(self, data):
        return decode(data, self.special)

    def special(self, tag, v):
        if tag == "opaque" and type(v) is str:
            return Opaque(v)
        if tag == "ref" and type(v) is int and self.keep:
            return Handle(self, v, self.named)
        raise ValueError(tag)


def _text(value, cap):
    """Text that every JSON decoder takes: no lone surrogates."""
    return value[:cap].encode("utf-8", "replace").decode()


def revive(info):
    """The candidate's exception, of the builtin class of that name where there is one; what it says of itself is cut."""
    if type(info) is not dict or type(info.get("type")) is not str or type(info.get("message", "")) is not str:
        raise ProtocolError("malformed error")
    told = {k: v for k, v in info.items() if v is None or type(v) in (int, bool)}  # line, end_line, raised, syntax, truncated
    told |= {"type": _text(info["type"], 100), "message": _text(info.get("message", ""), 1000)}
    if type(info.get("function")) is str:
        told["function"] = _text(info["function"], 100)
    told["frames"] = [[n, _text(name, 100)] for n, name in info.get("frames", ())[:20] if type(n) is int and type(name) is str]
    kind = _RAISABLE.get(told["type"]) or _RAISABLE.get(str(info.get("base")), CandidateError)
    try:
        error = kind(told["message"])
    except TypeError:  # UnicodeDecodeError and its like want more arguments
        error = CandidateError(told["message"])
    error.candidate = told
    return error


def copy_back(variable, value):
    """Brings a changed argument into the test's own variable, in place."""
    if type(variable) is list and type(value) is list:
        variable[:] = value
    elif type(variable) in (dict, set) and type(value) is type(variable):
        variable.clear()
        variable.update(value)
