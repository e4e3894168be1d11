"""Values between candidate and judge: tagged plain data as JSON, length-prefixed frames over a socket.

Scalars and lists are themselves; everything else is `{"t": tag, "v": content}`. Decoding builds builtins and a few
standard value types, never a class of the candidate, so nothing that arrives can lie in a comparison. No pickle, no eval.
Standard library only: this module also runs inside the sandbox.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import itertools
import json
import os
import struct

MAX_DEPTH = 200  # nesting of one value
MAX_COST = 1 << 23  # characters and nodes of one value
MAX_FRAME = 1 << 25  # bytes
CHUNK = 1000  # elements of an iterator that travel at once, the others when they are asked for
BIG = 10_000  # bits; beyond it decimal text is refused by int()

_encode = json.encoder.c_make_encoder(None, None, json.encoder.encode_basestring_ascii, None, ": ", ", ", False, False, True)  # type: ignore[attr-defined]
_scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # in C both: patched builtins do not reach them
_SEQUENCES = {tuple: "tuple", set: "set", frozenset: "frozenset", collections.deque: "deque"}
_SOURCES = ((i for i in range(0)), reversed([]), *(iter(k()) for k in (list, tuple, dict, set, str)), iter(range(0)))
_ITERATORS = {*map(type, _SOURCES), map, filter, zip, enumerate, reversed}
_VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
_DICTS = {k.__name__: k for k in (dict, collections.Counter, collections.OrderedDict)}
_SCALARS: dict = {  # class: its content; the tag is the type's name
    bytes: bytes.hex,
    bytearray: bytearray.hex,
    complex: lambda x: [x.real, x.imag],
    range: lambda x: [x.start, x.stop, x.step],
    decimal.Decimal: str,
    fractions.Fraction: lambda x: [hex(x.numerator), hex(x.denominator)],
    datetime.timedelta: lambda x: [x.days, x.seconds, x.microseconds],
    **{k: k.isoformat for k in (datetime.datetime, datetime.date, datetime.time)},
}
_BASES = (str, int, float, list, tuple, dict, set, frozenset, bytes)
_TYPES = {k: v for k, v in vars(builtins).items() if isinstance(v, type)}
_FUNCTIONS = {k: v for k, v in vars(builtins).items() if type(v) is type(len)}
_BUILD = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque, "iter": iter}
_REBUILD = {
    "int": lambda v: int(v, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda v: complex(*v),
    "range": lambda v: range(*v),
    "Decimal": decimal.Decimal,
    "Fraction": lambda v: fractions.Fraction(int(v[0], 16), int(v[1], 16)),
    "timedelta": lambda v: datetime.timedelta(*v),
    "type": _TYPES.__getitem__,
    **{k.__name__: k.fromisoformat for k in (datetime.datetime, datetime.date, datetime.time)},
}


class ProtocolError(Exception):
    """The other side sent what no honest peer sends."""


class Unsupported(Exception):
    """A value that does not travel."""


class Rest:
    """What is left of an iterator, a list at a time."""

    def __init__(self, iterator):
        self.iterator = iterator

    def __call__(self):
        return list(itertools.islice(self.iterator, CHUNK))


class Encoder:
    """One value -> JSON-able data. `special(value)` may give the content for what is no plain data, or None."""

    def __init__(self, special=None):
        self.special, self.cost = special, 0

    def __call__(self, x, depth=0):
        self.cost += 1
        if depth > MAX_DEPTH or self.cost > MAX_COST:
            raise Unsupported("value too deep or too large")
        kind = type(x)
        if kind is str:
            self.cost += len(x)
            if self.cost > MAX_COST:
                raise Unsupported("value too large")
            return x
        if x is None or kind is bool or kind is float:
            return x
        if kind is int:
            self.cost += x.bit_length() >> 3
            return x if x.bit_length() < BIG else {"t": "int", "v": hex(x)}
        if kind is list:
            return [self(e, depth + 1) for e in x]
        return self._tagged(x, kind, depth + 1)

    def _tagged(self, x, kind, depth):
        if kind in _SEQUENCES:
            return {"t": _SEQUENCES[kind], "v": [self(e, depth) for e in x]}
        if kind in _DICTS.values():
            return {"t": kind.__name__, "v": [[self(k, depth), self(v, depth)] for k, v in x.items()]}
        if kind is collections.defaultdict:
            factory = next((name for name, k in _TYPES.items() if k is x.default_factory), None)
            return {"t": "defaultdict", "v": [self(dict(x), depth), factory]}
        if kind in _ITERATORS or kind.__module__ == "itertools":
            first = [self(e, depth) for e in itertools.islice(x, CHUNK)]
            if len(first) < CHUNK or self.special is None:
                return {"t": "iter", "v": first}
            return {"t": "lazy", "v": [first, self.special(Rest(x))]}
        if kind in _VIEWS:
            return {"t": _VIEWS[kind], "v": [self(e, depth) for e in x]}
        if kind in _SCALARS:
            self.cost += len(x) if kind in (bytes, bytearray) else 0
            return {"t": kind.__name__, "v": _SCALARS[kind](x)}
        if kind is type and _TYPES.get(x.__name__) is x:
            return {"t": "type", "v": x.__name__}
        content = self.special(x) if self.special else None
        if content is not None:
            return content
        for base in _BASES:  # a subclass travels as what its base class holds: enums, named tuples, ...
            if base in kind.__mro__:
                return self(_as_base(base, x), depth)
        return {"t": "opaque", "v": str(kind.__name__)[:100]}


def _as_base(base, x):
    """The content of a subclass instance as an exact `base`, by the base's own methods."""
    if base in (int, float):
        return base.__pos__(x)
    if base is str:
        return str.__str__(x)
    if base is dict:
        return dict(dict.items(x))
    return base(base.__iter__(x))


def decode(x, special=None):
    """The value of encoded data; `special(tag, content)` gives what is no plain data. Raises ProtocolError."""
    if type(x) is list:
        return [decode(e, special) for e in x]
    if type(x) is not dict:
        return x
    try:
        tag, v = x["t"], x["v"]
        if tag in _BUILD:
            return _BUILD[tag]([decode(e, special) for e in v])
        if tag in _DICTS:
            return _DICTS[tag]({decode(k, special): decode(e, special) for k, e in v})
        if tag == "defaultdict":
            return collections.defaultdict(v[1] and _TYPES[v[1]], decode(v[0], special))
        if tag == "lazy":
            return itertools.chain(decode(v[0], special), itertools.chain.from_iterable(iter(decode(v[1], special), [])))
        if tag in ("keys", "values", "items"):
            items = [decode(e, special) for e in v]
            source = dict(items) if tag == "items" else dict.fromkeys(items) if tag == "keys" else dict(enumerate(items))
            return getattr(source, tag)()
        if tag in _REBUILD:
            return _REBUILD[tag](v)
        if special is None:
            raise ValueError(tag)
        return special(tag, v)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ProtocolError(f"malformed value: {type(error).__name__}") from None


def builtin_name(x):
    """The name of a builtin function such as `len`, or None. It travels from judge to candidate only."""
    name = getattr(x, "__name__", None)
    return name if type(x) is type(len) and _FUNCTIONS.get(name) is x else None


def send(fd, message, write=os.write):
    """One frame: 4 bytes of length, then JSON."""
    data = "".join(_encode(message, 0)).encode("ascii")
    view = memoryview(struct.pack("!I", len(data)) + data)
    while view:
        try:
            view = view[write(fd, view) :]
        except BlockingIOError:  # the program made the shared descriptor non-blocking
            os.set_blocking(fd, True)


def receive(fd, read=os.read):
    """The next frame, or None at the end of the stream. Raises ProtocolError for garbage."""
    head = _exactly(fd, 4, read)
    if head is None:
        return None
    size = struct.unpack("!I", head)[0]
    if size > MAX_FRAME:
        raise ProtocolError("frame too long")
    data = _exactly(fd, size, read)
    if data is None:
        return None
    try:
        message, end = _scan(data.decode("ascii"), 0)
    except (ValueError, RecursionError, MemoryError, StopIteration):
        raise ProtocolError("frame is no JSON") from None
    if end != len(data) or type(message) is not dict:
        raise ProtocolError("frame is no JSON object")
    return message


def _exactly(fd, size, read):
    chunks = []
    while size:
        try:
            chunk = read(fd, size)
        except ConnectionError:
            return None
        except BlockingIOError:
            os.set_blocking(fd, True)
            continue
        if not chunk:
            return None
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)
