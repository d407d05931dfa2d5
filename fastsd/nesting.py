"""Pickle streams that no unpickler can stand, told from their opcodes alone.

Hashing a tuple takes a frame of the C stack a level, and follows every path to what is in it: a
few thousand bytes of nested tuples end the process, a few dozen that refer to one another keep it
busy for ever. torch's restricted unpickler takes both for keys. What this walk does not know it
leaves to that unpickler, which knows no other opcodes either.
"""

from __future__ import annotations

import pickle
from typing import NamedTuple

_DEPTH_MAX = 1000  # tuples in tuples; Python itself pickles no more
# How many tuples hashing one may visit, each as often as it is referred to, beyond those in the
# stream; and the same for all keys of dictionaries together.
_COST_MAX = 100_000
_KEYS_COST_MAX = 10_000_000


class _Value(NamedTuple):
    """A value on the stack: zeros for what hashing does not look into."""

    depth: int = 0
    cost: int = 0


_LEAF, _FLAT = _Value(), _Value(1, 1)
# Opcodes that push a value of so many bytes, ...
_CONSTANTS = {ord(op): 0 for op in "N)]}"} | {ord("K"): 1, ord("M"): 2, ord("J"): 4, ord("G"): 8}
_CONSTANTS |= {0x88: 0, 0x89: 0, 0x8F: 0}  # NEWTRUE, NEWFALSE, EMPTY_SET
# ... or one behind its length, of so many bytes; and others.
_PREFIXED = {ord("X"): 4, ord("U"): 1, 0x8A: 1}  # BINUNICODE, SHORT_BINSTRING, LONG1
_BINGET, _LONG_BINGET, _BINPUT, _LONG_BINPUT = b"hjqr"
_PROTO, _GLOBAL, _STOP = b"\x80c."


def check_nesting(stream: bytes) -> None:
    """Raises UnpicklingError for a stream with such tuples; takes time in proportion to it."""
    try:
        _walk(stream)
    except (LookupError, ValueError):
        pass  # cut short, or no such pickle: the unpickler will say it


def _walk(stream: bytes) -> None:
    machine = _Machine()
    memo: dict[int, _Value] = {}
    at = 0
    while (op := stream[at]) != _STOP:
        at += 1
        if op == _BINPUT:
            memo[stream[at]] = machine.stack[-1]
            at += 1
        elif op in _CONSTANTS:
            machine.stack.append(_LEAF)
            at += _CONSTANTS[op]
        elif op == _BINGET:
            machine.stack.append(memo[stream[at]])
            at += 1
        elif op in _EFFECTS:
            _EFFECTS[op](machine)
        elif op in _PREFIXED:
            begin = at
            at += _PREFIXED[op]
            at += int.from_bytes(stream[begin:at], "little")
            machine.stack.append(_LEAF)
        elif op == _LONG_BINPUT:
            memo[int.from_bytes(stream[at : at + 4], "little")] = machine.stack[-1]
            at += 4
        elif op == _LONG_BINGET:
            machine.stack.append(memo[int.from_bytes(stream[at : at + 4], "little")])
            at += 4
        elif op == _GLOBAL:
            at = stream.index(b"\n", stream.index(b"\n", at) + 1) + 1
            machine.stack.append(_LEAF)
        elif op == _PROTO:
            at += 1
        else:
            raise LookupError(op)


class _Machine:
    """The stack of an unpickler, and what its opcodes without arguments do to it."""

    def __init__(self) -> None:
        self.stack: list[_Value] = []
        self._below: list[list[_Value]] = []
        self._tuples = 0
        self._keys_cost = 0

    def mark(self) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _pop_mark(self) -> list[_Value]:
        values, self.stack = self.stack, self._below.pop()
        return values

    def pop(self) -> None:
        self.stack.pop()

    def make_tuple_of_one(self) -> None:
        self._push_tuple([self.stack.pop()])

    def make_tuple_of_two(self) -> None:
        self._push_tuple([self.stack.pop(), self.stack.pop()])

    def make_tuple_of_three(self) -> None:
        self._push_tuple([self.stack.pop(), self.stack.pop(), self.stack.pop()])

    def make_tuple(self) -> None:
        self._push_tuple(self._pop_mark())

    def _push_tuple(self, values: list[_Value]) -> None:
        self._tuples += 1
        nested = [value for value in values if value is not _LEAF]
        if not nested:
            self.stack.append(_FLAT)
            return
        depth = 1 + max(value.depth for value in nested)
        cost = 1 + sum(value.cost for value in nested)
        if depth > _DEPTH_MAX or cost > _COST_MAX + self._tuples:
            raise pickle.UnpicklingError("tuples are nested too deeply")
        self.stack.append(_Value(depth, cost))

    def call(self) -> None:
        """A named tuple, for one, is hashed as the tuple of its arguments."""
        self.stack[-2:] = self.stack[-1:]

    def load_storage(self) -> None:
        self.stack[-1] = _LEAF

    def set_item(self) -> None:
        self.stack.pop()
        self._use_keys([self.stack.pop()])

    def set_items(self) -> None:
        self._use_keys(self._pop_mark()[::2])

    def _use_keys(self, keys: list[_Value]) -> None:
        self._keys_cost += sum(key.cost for key in keys if key is not _LEAF)
        if self._keys_cost > _KEYS_COST_MAX + self._tuples:
            raise pickle.UnpicklingError("the keys of dictionaries are too large")


_EFFECTS = {
    ord("("): _Machine.mark,
    ord("t"): _Machine.make_tuple,
    0x85: _Machine.make_tuple_of_one,
    0x86: _Machine.make_tuple_of_two,
    0x87: _Machine.make_tuple_of_three,
    ord("R"): _Machine.call,
    0x81: _Machine.call,  # NEWOBJ
    ord("b"): _Machine.pop,  # BUILD
    ord("a"): _Machine.pop,  # APPEND
    ord("e"): _Machine._pop_mark,  # APPENDS
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    ord("Q"): _Machine.load_storage,
}
