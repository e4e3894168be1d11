"""The candidate as the judge sees it: its functions, its objects, its errors. Standard library only.

A call becomes a frame on the socket; what comes back is plain data, an object that stays with the candidate (Handle, only
where the tests use a result as an object), or an Opaque value that fails on any use.

What a pass may rest on in value mode: plain data, what calling an object returned, and what the tests name themselves: an
instance of a class (a capital letter) or `name.attribute`, with its attributes, methods, items and sums (level 2), and of what
its methods return such attributes as no builtin type has (level 1). The program's own word is the rest, `candidate_eq`: every
comparison and truth of an object, what an operator made of a value of the test (`abs(x - 5) < 1e-6`) with all that is done to
it (level -1), and whatever the return value of a function says of itself (level 0).
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
    """An object that stays with the candidate; what is done to it happens there. All names of it are the program's."""

    __slots__ = ("level", "number", "peer")

    def __init__(self, *parts):
        for name, part in zip(Handle.__slots__, parts, strict=True):
            object.__setattr__(self, name, part)

    def __getattribute__(self, name):
        if name == "__class__":  # what isinstance() reads: this one has the methods of everything, and would be taken for it
            raise TypeError("the class of a program's object is known to the program only")
        if name == "__deepcopy__":  # asked of the object itself
            return lambda memo: _operate("deepcopy", 2, (self,))
        return _operate("getattr", 2 if name in COMMON else 1, (self, name))

    def __setattr__(self, name, value):
        _operate("setattr", 0, (self, name, value))

    def __call__(self, *args, **kwargs):
        return _operate("call", 0, (self, *args), kwargs)

    def __next__(self):
        try:
            return _operate("next", 2, (self,))
        except CandidateError as error:
            if error.candidate["type"] == "StopIteration":
                raise StopIteration from None
            raise

    def __exit__(self, *error):
        if error[1] is None:  # an exception of the test does not travel
            _operate("exit", 2, (self,))


def _operate(name, needed, args, kwargs=None):
    """What an operation on objects gives. Below the level `needed` it is the program's own word; so is what an operator made of
    a value of the test, and all that is then done with it (level -1)."""
    handles = [a for a in args if type(a) is Handle]
    peer = _part(handles[0], "peer")
    level = min(_part(h, "level") for h in (handles if name in _ARITHMETIC else handles[:1]))
    mixed = name in _ARITHMETIC and len(handles) < len(args)
    peer.candidate_eq |= level < needed
    result = peer.ask(["op", name], args, kwargs, level=-1 if mixed else min(level, 1) if name == "call" else level)
    peer.candidate_eq |= mixed and type(result) is not Handle
    return result


def _forward(name, needed):
    return lambda *args: _operate(name, needed, args)


_part = object.__getattribute__
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "contains")
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift", "and_", "or_", "xor")
_UNARY = ("neg", "pos", "invert", "abs", "round")
_OTHERS = ("len", "iter", "str", "repr", "format", "float", "int", "index", "reversed", "getitem")
_ARITHMETIC = {*_BINARY, *_UNARY, "divmod", *("i" + n.strip("_") for n in _BINARY)}
for _name in (*_COMPARISONS, "hash"):
    setattr(Handle, f"__{_name}__", _forward(_name, 3))
Handle.__bool__ = _forward("truth", 3)  # type: ignore[attr-defined]
for _name in (*_ARITHMETIC, *_OTHERS, "setitem", "delitem", "delattr", "enter", "copy"):
    setattr(Handle, f"__{_name.strip('_')}__", _forward(_name, 2))


class Function:
    """A name of the candidate: its function, class or global value."""

    __slots__ = ("name", "peer")

    def __init__(self, peer, name):
        object.__setattr__(self, "peer", peer)
        object.__setattr__(self, "name", name)

    def __call__(self, *args, **kwargs):
        return call(self, args, kwargs)

    def __getattribute__(self, name):
        return getattr(_value(self), name)


def call(function, args, kwargs, inout=()):
    return _part(function, "peer").ask(["name", _part(function, "name")], args, kwargs, inout)


def _value(function):
    return _part(function, "peer").ask(["value", _part(function, "name")], ())


def _resolved(operation):
    """A global value is asked for when it is used, not taken for the name."""
    return lambda self, *args: operation(_value(self), *args)


def _reflected(operation):
    return lambda self, other: operation(other, _value(self))


for _name in (*_COMPARISONS, *_BINARY, *_UNARY, *_OTHERS, "divmod", "bool", "next"):
    setattr(Function, f"__{_name.strip('_')}__", _resolved(getattr(operator, _name, None) or getattr(builtins, _name)))
for _name in (*_BINARY, "divmod"):
    setattr(Handle, f"__r{_name.strip('_')}__", lambda self, other, name=_name: _operate(name, 2, (other, self)))
    setattr(Function, f"__r{_name.strip('_')}__", _reflected(getattr(operator, _name, divmod)))


class Peer:
    """The candidate as seen from here. handles: names whose results may stay there. `mark` gets b"*" when a value has arrived
    and b"?" when another one is awaited. waited: seconds spent waiting for it. count: questions of the tests, not those that the
    program led to: by calling a function of theirs, or by how it iterates."""

    def __init__(self, fd, handles, mark):
        self.fd, self.handles, self.mark, self.answered, self.waited = fd, handles, mark, False, 0.0
        self.sent, self.count, self.dead, self.violation, self.functions = 0, 0, False, None, []
        self.candidate_eq = self.inout = False
        self.refused = None  # what of the tests cannot reach the candidate

    def receive(self, request=None):
        """The candidate's next frame, once it was sent the request. A candidate that does not read is waited for as well."""
        if self.violation:
            raise ProtocolError(self.violation)
        if self.dead:
            raise Died
        start = time.monotonic()
        try:
            if request is not None:
                if self.answered:
                    self.mark(b"?")
                with contextlib.suppress(OSError):  # the read says that it is gone
                    send(self.fd, request)
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

    def ask(self, target, args, kwargs=None, inout=(), level=0):
        (kind, name), number = target, self.sent + 1
        self.sent, self.count = number, self.count + (kind in ("name", "value") or name not in ("next", "rest"))
        keep = kind == "op" or name in self.handles
        level = level if kind in ("op", "rest") else 2 * (kind == "value" or name[:1].isupper())
        request = {"id": number, "target": target, "keep": keep, "inout": list(inout)}
        request |= {"args": [self.encode(a) for a in args], "kwargs": {k: self.encode(v) for k, v in (kwargs or {}).items()}}

        def decoded(data):
            return decode(data, lambda tag, v: self.special(tag, v, keep, level))

        while "callback" in (reply := self.receive(request)):
            count, request = self.count, self.callback(reply, decoded)
            self.count = count
        self.answered = True
        self.mark(b"*")
        if type(reply.get("id")) is not int or reply["id"] != number or not ("error" in reply) ^ ("value" in reply):
            self.violation = "answer to another question"
            raise ProtocolError(self.violation)
        if "error" in reply:
            raise self.revived(reply["error"])
        for position, value in zip(inout, map(decoded, reply.get("inout", ())), strict=True):
            self.inout = True
            copy_back(args[position], value)
        return decoded(reply["value"])

    def revived(self, info):
        try:
            return revive(info)
        except (ValueError, TypeError, LookupError):
            raise ProtocolError("malformed error") from None

    def callback(self, reply, decoded):
        """The answer of a function of the test that the candidate calls; it may ask the candidate in turn."""
        try:
            function, args = self.functions[reply["callback"]], [decoded(a) for a in reply["args"]]
        except (ProtocolError, LookupError, TypeError):
            self.violation = "malformed callback"
            raise ProtocolError(self.violation) from None
        try:
            return {"value": self.encode(function(*args))}
        except ProtocolError:
            raise
        except Exception as error:  # noqa: BLE001 - the test's function failed; its caller is told
            return {"error": f"{type(error).__name__}: {error}"[:300]}

    def encode(self, value):
        return Encoder(self.reference)(value)

    def reference(self, value):
        if type(value) is Handle:
            return {"t": "ref", "v": _part(value, "number")}
        if type(value) is Function:
            return {"t": "name", "v": _part(value, "name")}
        if type(value) is Opaque:
            bool(value)
        if name := builtin_name(value):
            return {"t": "builtin", "v": name}
        if callable(value):
            self.functions.append(value)
            return {"t": "fn", "v": len(self.functions) - 1}
        self.refused = f"a {type(value).__name__[:100]} as an argument"
        raise TypeError(self.refused)

    def special(self, tag, v, keep, level):
        if tag == "opaque" and type(v) is str:
            return Opaque(v)
        if tag == "ref" and type(v) is int and keep:
            return Handle(level, v, self)
        if tag == "rest" and type(v) is int:
            return lambda: self.ask(["op" if keep else "rest", "rest"], (Handle(level, v, self),), level=level)
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
