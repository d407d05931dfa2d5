"""Nested objects to tensors and a plain tree, and back, without pickle.

The tree is JSON (docs/FORMAT.md, "The tree"). Values of JSON stand for themselves; everything else
is an object with one member whose name starts with "$". A dictionary of strings to tensors needs
no tree.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from fastsd.errors import FormatError, UnsupportedError
from fastsd.tensors import is_numpy_native

_INT_MAX = 2**53 - 1  # what every JSON reader keeps exact
_TENSOR_TYPES = {torch.Tensor, torch.nn.Parameter}


class Flat(NamedTuple):
    """An object as the container holds it: its tensors under unique names, in order, and its tree.

    ``tree`` is None for a flat dictionary, whose names are its keys; then ``is_ordered`` says that
    it is an OrderedDict, and ``state_metadata`` holds its `_metadata`. Both texts are JSON in
    UTF-8.
    """

    names: list[str]
    tensors: list[torch.Tensor | np.ndarray]
    tree: bytes | None = None
    is_ordered: bool = False
    state_metadata: bytes | None = None


# ---- From objects ----


def flatten(obj: object) -> Flat:
    """Takes an object apart. Raises UnsupportedError, naming the place, for what is not plain."""
    try:
        return _flatten_dict(obj) or _flatten_tree(obj)
    except RecursionError:
        raise UnsupportedError("the object is nested too deeply") from None


def _flatten_dict(obj: object) -> Flat | None:
    if type(obj) not in (dict, OrderedDict):
        return None
    values = list(obj.values())  # type: ignore[attr-defined]
    names = list(obj)  # type: ignore[call-overload]
    is_flat = (
        set(map(type, values)) <= _TENSOR_TYPES
        and set(map(type, names)) <= {str}
        and not any(map(attrgetter("__dict__"), values))
        and _are_utf8(names)
    )
    attributes = getattr(obj, "__dict__", {})
    if not is_flat or attributes.keys() - {"_metadata"}:
        return None
    if not attributes:
        return Flat(names, values, is_ordered=type(obj) is OrderedDict)
    metadata = _encode_state_metadata(attributes["_metadata"])
    if metadata is None:
        return None
    return Flat(names, values, is_ordered=True, state_metadata=metadata)


def _are_utf8(names: list[str]) -> bool:
    try:
        return "".join(names).encode() is not None
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold and UTF-8 cannot
        return False


def _encode_state_metadata(metadata: object) -> bytes | None:
    """The section for what nn.Module.state_dict makes: module names to dicts of plain values."""
    if type(metadata) is not OrderedDict or metadata.__dict__:
        return None
    encoder = _Encoder()
    items = {name: encoder.encode(value, "_metadata") for name, value in metadata.items()}
    is_regular = set(map(type, metadata)) <= {str} and not encoder.tensors and not encoder.repeated
    return _to_json(items) if is_regular else None


def _flatten_tree(obj: object) -> Flat:
    encoder = _Encoder()
    tree = encoder.encode(obj, "")
    if encoder.repeated:
        # Rare, so that it may cost a second pass: only now is known what to mark when first met.
        encoder = _Encoder(encoder.repeated)
        tree = encoder.encode(obj, "")
    return Flat(encoder.names, encoder.tensors, tree=_to_json(tree))


def _to_json(node: object) -> bytes:
    return json.dumps(node, separators=(",", ":"), allow_nan=False).encode()


class _Encoder:
    """One walk over an object. ``repeated``: the containers that were met more than once."""

    def __init__(self, known_repeated: Iterable[int] = ()) -> None:
        self.names: list[str] = []
        self.tensors: list[torch.Tensor | np.ndarray] = []
        self.repeated: set[int] = set()
        self._marks = dict.fromkeys(known_repeated, -1)
        self._used_names: set[str] = set()
        self._seen: set[int] = set()
        self._open: set[int] = set()
        self._kept: list[object] = []

    def encode(self, value: Any, path: str) -> Any:
        kind = type(value)
        if kind is str or kind is bool or value is None:
            return value
        encode = _ENCODERS.get(kind)
        if encode is not None:
            return encode(self, value, path)
        if isinstance(value, (torch.Tensor, torch.nn.Module)) or kind not in _CONTAINERS:
            return self._encode_other(value, path)
        return self._encode_container(_CONTAINERS[kind], value, path)

    def _encode_container(
        self, encode: Callable[[_Encoder, Any, str], Any], value: Any, path: str
    ) -> Any:
        identity = id(value)
        if identity in self._open:
            raise UnsupportedError(f"{_place(path)} contains itself")
        if identity in self._seen:
            mark = self._marks.get(identity)
            if mark is not None:
                return {"$ref": mark}
            self.repeated.add(identity)
            return None
        self._seen.add(identity)
        self._open.add(identity)
        node = encode(self, value, path)
        self._open.remove(identity)
        attributes = getattr(value, "__dict__", None)
        if attributes:
            node = {"$attributes": [node, self._encode_items(attributes, path)]}
        if identity in self._marks:
            self._marks[identity] = len([m for m in self._marks.values() if m >= 0])
            node = {"$def": [self._marks[identity], node]}
        return node

    def _encode_other(self, value: Any, path: str) -> Any:
        if isinstance(value, np.generic):
            return {"$numpy": [_describe_dtype(value.dtype, path), _base64(value.tobytes())]}
        module = type(value).__module__
        if module == "torch.return_types":
            name = type(value).__qualname__
            return {
                "$return_type": [
                    name,
                    [self.encode(v, _join(path, i)) for i, v in enumerate(value)],
                ]
            }
        hint = "save its state_dict()" if isinstance(value, torch.nn.Module) else None
        raise UnsupportedError(
            f"{_place(path)} is a {module}.{type(value).__qualname__}, which is not plain data"
            + (f": {hint}" if hint else "")
        )

    def _encode_int(self, value: int, path: str) -> Any:
        return value if -_INT_MAX <= value <= _INT_MAX else {"$int": hex(value)}

    def _encode_float(self, value: float, path: str) -> Any:
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}

    def _encode_complex(self, value: complex, path: str) -> Any:
        parts = value.real, value.imag
        return {"$complex": [struct.pack(">d", part).hex() for part in parts]}

    def _encode_bytes(self, value: bytes, path: str) -> Any:
        return {"$bytes": _base64(value)}

    def _encode_bytearray(self, value: bytearray, path: str) -> Any:
        return {"$bytearray": _base64(value)}

    def _encode_named(self, value: Any, path: str) -> Any:
        """A torch.dtype, device, layout or memory format."""
        return {"$" + type(value).__name__: str(value).removeprefix("torch.")}

    def _encode_list(self, value: list[Any], path: str) -> Any:
        return [self.encode(v, _join(path, i)) for i, v in enumerate(value)]

    def _encode_tuple(self, value: tuple[Any, ...], path: str) -> Any:
        return {"$tuple": [self.encode(v, _join(path, i)) for i, v in enumerate(value)]}

    def _encode_size(self, value: torch.Size, path: str) -> Any:
        return {"$Size": [int(n) for n in value]}

    def _encode_dict(self, value: dict[Any, Any], path: str) -> Any:
        node = self._encode_items(value, path)
        return node if isinstance(node, dict) else {"$dict": node}

    def _encode_ordered_dict(self, value: OrderedDict[Any, Any], path: str) -> Any:
        return {"$OrderedDict": self._encode_items(value, path)}

    def _encode_items(self, value: dict[Any, Any], path: str) -> Any:
        """A JSON object where that is unambiguous, else a list of pairs."""
        if set(map(type, value)) <= {str} and not _is_special(value):
            return {key: self.encode(v, _join(path, key)) for key, v in value.items()}
        return [
            [self.encode(key, path), self.encode(v, _join(path, key))] for key, v in value.items()
        ]

    def _encode_set(self, value: set[Any] | frozenset[Any], path: str) -> Any:
        # Sorted, as the same set may be iterated in another order by another process.
        nodes = sorted((self.encode(v, path) for v in value), key=_to_json)
        return {"$" + type(value).__name__: nodes}

    def _encode_tensor(self, value: torch.Tensor, path: str) -> Any:
        node = {"$tensor": self._add(value, path)}
        attributes = getattr(value, "__dict__", None)
        return {"$attributes": [node, self._encode_items(attributes, path)]} if attributes else node

    def _encode_array(self, value: np.ndarray, path: str) -> Any:
        if is_numpy_native(value.dtype):
            return {"$ndarray": [self._add(value, path)]}
        dtype = _describe_dtype(value.dtype, path)
        raw = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        self._kept.append(raw)
        return {"$ndarray": [self._add(raw, path), dtype, list(value.shape)]}

    def _add(self, value: torch.Tensor | np.ndarray, path: str) -> int:
        name = path.encode("utf-8", "backslashreplace").decode() or "tensor"
        unique, count = name, 1
        while unique in self._used_names:
            count += 1
            unique = f"{name}#{count}"
        self._used_names.add(unique)
        self.names.append(unique)
        self.tensors.append(value)
        return len(self.tensors) - 1


_ENCODERS: dict[type, Callable[[_Encoder, Any, str], Any]] = {
    int: _Encoder._encode_int,
    float: _Encoder._encode_float,
    complex: _Encoder._encode_complex,
    bytes: _Encoder._encode_bytes,
    torch.Size: _Encoder._encode_size,
    torch.dtype: _Encoder._encode_named,
    torch.device: _Encoder._encode_named,
    torch.layout: _Encoder._encode_named,
    torch.memory_format: _Encoder._encode_named,
    torch.Tensor: _Encoder._encode_tensor,
    torch.nn.Parameter: _Encoder._encode_tensor,
}
# Values that may be met twice, and then are one object again after loading.
_CONTAINERS: dict[type, Callable[[_Encoder, Any, str], Any]] = {
    list: _Encoder._encode_list,
    tuple: _Encoder._encode_tuple,
    dict: _Encoder._encode_dict,
    OrderedDict: _Encoder._encode_ordered_dict,
    set: _Encoder._encode_set,
    frozenset: _Encoder._encode_set,
    bytearray: _Encoder._encode_bytearray,
    np.ndarray: _Encoder._encode_array,
}


def _is_special(value: dict[Any, Any]) -> bool:
    return len(value) == 1 and next(iter(value)).startswith("$")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _place(path: str) -> str:
    return f'"{path}"' if path else "the object"


def _base64(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode()


def _describe_dtype(dtype: np.dtype[Any], path: str) -> Any:
    if dtype.hasobject:
        raise UnsupportedError(f"{_place(path)} is a numpy {dtype}, which holds Python objects")
    return np.lib.format.dtype_to_descr(dtype)


# ---- To objects ----


def restore_flat(
    by_name: dict[str, torch.Tensor], is_ordered: bool, state_metadata: bytes | None
) -> dict[str, torch.Tensor]:
    """The flat dictionary that was saved; ``by_name`` itself where that will do."""
    if not is_ordered:
        return by_name
    ordered = OrderedDict(by_name)
    if state_metadata is not None:
        vars(ordered)["_metadata"] = OrderedDict(_from_json(state_metadata, []))
    return ordered


def restore_tree(text: bytes, tensors: list[torch.Tensor]) -> Any:
    """The object of a tree whose tensors are given. Raises FormatError."""
    return _from_json(text, tensors)


def _from_json(text: bytes, tensors: list[torch.Tensor]) -> Any:
    try:
        if b'"$' not in text:
            return json.loads(text, parse_constant=_reject_constant)
        hook = _Decoder(tensors).decode
        return json.loads(text, object_pairs_hook=hook, parse_constant=_reject_constant)
    except FormatError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        # TypeError and the like: the JSON is well-formed and a node has not the shape it must have.
        raise FormatError(f"the tree is damaged: {type(error).__name__}: {error}") from error


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


class _Decoder:
    """Turns the objects of the tree into values, innermost first, as the JSON parser meets them."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        self._defined: dict[int, Any] = {}

    def decode(self, pairs: list[tuple[str, Any]]) -> Any:
        if len(pairs) == 1:
            key, value = pairs[0]
            if key.startswith("$"):
                return _DECODERS[key](self, value)
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice in an object")
        return result

    def _decode_def(self, node: list[Any]) -> Any:
        number, value = node
        self._defined[number] = value
        return value

    def _decode_ref(self, number: int) -> Any:
        return self._defined[number]

    def _decode_attributes(self, node: list[Any]) -> Any:
        value, attributes = node
        for name, attribute in dict(attributes).items():
            setattr(value, name, attribute)
        return value

    def _decode_tensor(self, number: int) -> torch.Tensor:
        if number < 0:
            raise IndexError(number)
        return self._tensors[number]

    def _decode_array(self, node: list[Any]) -> np.ndarray:
        array: np.ndarray = self._decode_tensor(node[0]).numpy()
        if len(node) == 1:
            return array
        return np.frombuffer(bytearray(array), _restore_dtype(node[1])).reshape(node[2])


def _restore_dtype(descr: Any) -> np.dtype[Any]:
    # JSON has no tuples, which numpy's own description is made of.
    def to_tuples(node: Any) -> Any:
        if not isinstance(node, list):
            return node
        return [tuple(map(to_field, field)) for field in node]

    def to_field(part: Any) -> Any:
        if isinstance(part, list):
            return tuple(part) if all(isinstance(n, int) for n in part) else to_tuples(part)
        return part

    dtype: np.dtype[Any] = np.lib.format.descr_to_dtype(to_tuples(descr))
    if dtype.hasobject:
        raise ValueError(f"numpy dtype {dtype} holds Python objects")
    return dtype


def _to_scalar(_: _Decoder, node: list[Any]) -> Any:
    dtype, text = node
    return np.frombuffer(base64.b64decode(text, validate=True), _restore_dtype(dtype))[0]


def _to_float(text: str) -> float:
    value: float = struct.unpack(">d", bytes.fromhex(text))[0]
    return value


def _named(kind: type) -> Callable[[_Decoder, str], Any]:
    def decode(_: _Decoder, name: str) -> Any:
        value = getattr(torch, name)
        if type(value) is not kind:
            raise ValueError(f"torch.{name} is no {kind.__name__}")
        return value

    return decode


def _to_return_type(_: _Decoder, node: list[Any]) -> Any:
    name, values = node
    kind = getattr(torch.return_types, name)
    if not (isinstance(kind, type) and issubclass(kind, tuple)):
        raise ValueError(f"torch.return_types.{name} is no named tuple")
    return kind(values)


_DECODERS: dict[str, Callable[[_Decoder, Any], Any]] = {
    "$def": _Decoder._decode_def,
    "$ref": _Decoder._decode_ref,
    "$attributes": _Decoder._decode_attributes,
    "$tensor": _Decoder._decode_tensor,
    "$ndarray": _Decoder._decode_array,
    "$numpy": _to_scalar,
    "$int": lambda _, text: int(text, 16),
    "$float": lambda _, text: _to_float(text),
    "$complex": lambda _, parts: complex(*map(_to_float, parts)),
    "$bytes": lambda _, text: base64.b64decode(text, validate=True),
    "$bytearray": lambda _, text: bytearray(base64.b64decode(text, validate=True)),
    "$tuple": lambda _, values: tuple(values),
    "$Size": lambda _, values: torch.Size(values),
    "$return_type": _to_return_type,
    "$set": lambda _, values: set(values),
    "$frozenset": lambda _, values: frozenset(values),
    "$dict": lambda _, pairs: dict(pairs),
    "$OrderedDict": lambda _, items: OrderedDict(items),
    "$dtype": _named(torch.dtype),
    "$device": lambda _, name: torch.device(name),
    "$layout": _named(torch.layout),
    "$memory_format": _named(torch.memory_format),
}
