"""Nested objects to tensors and a plain tree, and back, without pickle.

The tree is JSON (docs/FORMAT.md, "The tree"). Values of JSON stand for themselves; everything else
is an object with one member whose name starts with "$". A dictionary of strings to tensors needs
no tree.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from fastsd.errors import FormatError, NotPlainError
from fastsd.formats.fsd import Section, decode_json
from fastsd.tensors import is_numpy_native, to_array

_INT_MAX = 2**53 - 1  # what every JSON reader keeps exact
_DEPTH_MAX = 250  # of containers: each is up to seven deep in JSON, of which 2000 can be read
_NAME_BYTES_MAX = 65536  # docs/FORMAT.md, "Tensors"
_NAME_CHARACTERS_MAX = 10_000  # which never take more than that, backslashes included
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
    """Takes an object apart. Raises NotPlainError, naming the place, for what is not plain."""
    try:
        return _flatten_dict(obj) or _flatten_tree(obj)
    except RecursionError:
        raise NotPlainError("the object is nested too deeply") from None


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
        and _are_short(names)
    )
    attributes = getattr(obj, "__dict__", {})
    if not is_flat or attributes.keys() - {"_metadata"}:
        return None
    if not attributes:
        return Flat(names, values, is_ordered=type(obj) is OrderedDict)
    metadata = encode_state_metadata(attributes["_metadata"])
    if metadata is None:
        return None
    return Flat(names, values, is_ordered=True, state_metadata=metadata)


def _are_utf8(names: Iterable[str]) -> bool:
    try:
        return "".join(names).encode() is not None
    except UnicodeEncodeError:  # a surrogate
        return False


def _are_short(names: list[str]) -> bool:
    long = max(map(len, names), default=0) > _NAME_CHARACTERS_MAX
    return not long or max(len(name.encode()) for name in names) <= _NAME_BYTES_MAX


def encode_state_metadata(metadata: object) -> bytes | None:
    """The section for what nn.Module.state_dict makes: module names to dicts of plain values."""
    if type(metadata) is not OrderedDict or metadata.__dict__:
        return None
    encoder = _Encoder()
    items = {name: encoder.encode(value, "_metadata") for name, value in metadata.items()}
    is_regular = (
        set(map(type, metadata)) <= {str}
        and _are_utf8(metadata)
        and not _is_special(metadata)
        and not encoder.tensors
        and not encoder.repeated
    )
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
    # Nodes are fresh, and none holds itself.
    return json.dumps(node, check_circular=False, separators=(",", ":"), allow_nan=False).encode()


class _Encoder:
    """One walk over an object. ``repeated``: the containers that were met more than once."""

    def __init__(self, known_repeated: Iterable[int] = ()) -> None:
        self.names: list[str] = []
        self.tensors: list[torch.Tensor | np.ndarray] = []
        self.repeated: list[int] = []
        self._marks = {identity: i for i, identity in enumerate(dict.fromkeys(known_repeated))}
        self._used_names: set[str] = set()
        self._seen: set[int] = set()
        self._open: set[int] = set()
        self._is_in_key = False

    def encode(self, value: Any, path: str) -> Any:
        if _is_literal(value):
            return value
        kind = type(value)
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
            raise NotPlainError(f"{_place(path)} contains itself")
        if len(self._open) == _DEPTH_MAX:
            raise NotPlainError(f"{_place(path)} is nested too deeply")
        if self._is_in_key:
            return encode(self, value, path)
        if identity in self._seen:
            if identity in self._marks:
                return {"$ref": self._marks[identity]}
            self.repeated.append(identity)
            return None
        self._seen.add(identity)
        self._open.add(identity)
        node = encode(self, value, path)
        self._open.remove(identity)
        if identity in self._marks:
            node = {"$def": [self._marks[identity], node]}
        return node

    def _encode_key(self, value: Any, path: str) -> Any:
        """A key of a dictionary, or an element of a set: nothing in it is shared with the rest.

        The elements of a set are sorted, so that none can refer to one before it. And hashing
        takes as long as all the paths through a value, of which a few shared levels make too many
        to walk.
        """
        was_in_key, self._is_in_key = self._is_in_key, True
        try:
            return self.encode(value, path)
        finally:
            self._is_in_key = was_in_key

    def _encode_attributes(self, node: Any, value: Any, path: str) -> Any:
        """The node of a value that may have attributes of its own."""
        attributes = vars(value)
        if not attributes:
            return node
        check_attributes(value, attributes)
        return {"$attributes": [node, self._encode_items(attributes, path)]}

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
        raise NotPlainError(
            f"{_place(path)} is a {module}.{type(value).__qualname__}, which is not plain data"
        )

    def _encode_str(self, value: str, path: str) -> Any:
        # JSON would join a pair of surrogates into one character.
        if _are_utf8([value]):
            return value
        return {"$str": _base64(value.encode("utf-8", "surrogatepass"))}

    def _encode_int(self, value: int, path: str) -> Any:
        return {"$int": hex(value)}

    def _encode_float(self, value: float, path: str) -> Any:
        return {"$float": struct.pack(">d", value).hex()}

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
        return [
            v if _is_literal(v) else self.encode(v, _join(path, i)) for i, v in enumerate(value)
        ]

    def _encode_tuple(self, value: tuple[Any, ...], path: str) -> Any:
        return {"$tuple": [self.encode(v, _join(path, i)) for i, v in enumerate(value)]}

    def _encode_size(self, value: torch.Size, path: str) -> Any:
        if any(n < 0 for n in value):
            raise NotPlainError(f"{_place(path)} is {value}, with a negative size")
        return {"$Size": [int(n) for n in value]}

    def _encode_dict(self, value: dict[Any, Any], path: str) -> Any:
        node = self._encode_items(value, path)
        return node if isinstance(node, dict) else {"$dict": node}

    def _encode_ordered_dict(self, value: OrderedDict[Any, Any], path: str) -> Any:
        node = {"$OrderedDict": self._encode_items(value, path)}
        return self._encode_attributes(node, value, path)

    def _encode_items(self, value: dict[Any, Any], path: str) -> Any:
        """A JSON object where that is unambiguous, else a list of pairs."""
        if set(map(type, value)) <= {str} and not _is_special(value) and _are_utf8(value):
            return {
                key: v if _is_literal(v) else self.encode(v, _join(path, key))
                for key, v in value.items()
            }
        return [
            [self._encode_key(key, path), self.encode(v, _join(path, key))]
            for key, v in value.items()
        ]

    def _encode_set(self, value: set[Any] | frozenset[Any], path: str) -> Any:
        # Sorted, as the same set may be iterated in another order by another process.
        nodes = sorted((self._encode_key(v, path) for v in value), key=_to_json)
        return {"$" + type(value).__name__: nodes}

    def _encode_tensor(self, value: torch.Tensor, path: str) -> Any:
        return self._encode_attributes({"$tensor": self._add(value, path)}, value, path)

    def _encode_array(self, value: np.ndarray, path: str) -> Any:
        if is_numpy_native(value.dtype):
            return {"$ndarray": [self._add(value, path)]}
        dtype = _describe_dtype(value.dtype, path)
        raw = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        return {"$ndarray": [self._add(raw, path), dtype, list(value.shape)]}

    def _add(self, value: torch.Tensor | np.ndarray, path: str) -> int:
        name = path[:_NAME_CHARACTERS_MAX].encode("utf-8", "backslashreplace").decode() or "tensor"
        unique, count = name, 1
        while unique in self._used_names:
            count += 1
            unique = f"{name}#{count}"
        self._used_names.add(unique)
        self.names.append(unique)
        self.tensors.append(value)
        return len(self.tensors) - 1


_ENCODERS: dict[type, Callable[[_Encoder, Any, str], Any]] = {
    str: _Encoder._encode_str,
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


def _is_literal(value: Any) -> bool:
    """Whether JSON has the value; quick, as most values of a tree are such."""
    kind = type(value)
    if kind is float:
        return math.isfinite(value)
    if kind is int:
        is_small: bool = -_INT_MAX <= value <= _INT_MAX
        return is_small
    return kind is bool or value is None or (kind is str and value.isascii())


def _is_special(value: dict[Any, Any]) -> bool:
    return len(value) == 1 and next(iter(value)).startswith("$")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _place(path: str) -> str:
    return f'"{path}"' if path else "the object"


def _base64(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode()


def _describe_dtype(dtype: np.dtype[Any], path: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy warns where it would have to pickle
            descr = np.lib.format.dtype_to_descr(dtype)
        is_kept = _restore_dtype(json.loads(json.dumps(descr))) == dtype
    except (
        ValueError,
        TypeError,
        UserWarning,
    ):  # Python objects, overlapping fields, fields out of order
        is_kept = False
    if not is_kept:
        raise NotPlainError(f"{_place(path)} has a numpy dtype that cannot be described: {dtype}")
    return descr


def check_attributes(value: Any, attributes: dict[Any, Any]) -> None:
    """Raises unless these may be attributes of the value's own: strings that its class has not."""
    for name in attributes:
        if type(name) is not str or hasattr(type(value), name):
            kind = type(value).__name__
            raise NotPlainError(f"an attribute {name!r} of a {kind} cannot be kept")


# ---- To objects ----


def restore_flat(
    by_name: dict[str, torch.Tensor], metadata: OrderedDict[str, Any] | None
) -> dict[str, torch.Tensor]:
    """``by_name`` itself, an OrderedDict if there is `_metadata`, which it then has."""
    if metadata is not None:
        vars(by_name)["_metadata"] = metadata
    return by_name


def restore_metadata(text: bytes | None) -> OrderedDict[str, Any] | None:
    """The `_metadata` of a flat dictionary, None if there is none. Raises FormatError."""
    if text is None:
        return None
    metadata = decode_json(text, Section.STATE_METADATA, [], _Decoder([]).decode)
    if type(metadata) is not dict:
        raise FormatError("section state_metadata is no JSON object")
    return OrderedDict(metadata)


def restore_tree(text: bytes, tensors: list[torch.Tensor]) -> Any:
    """The object of a tree whose tensors are given. Raises FormatError."""
    return decode_json(text, Section.TREE, tensors, _Decoder(tensors).decode)


class Opaque:
    """Stands for what only an unpickler could make."""


def restore_partly(text: bytes, tensors: list[torch.Tensor]) -> Any:
    """The object of a pickle's tree, with an `Opaque` wherever something is not plain.

    Raises FormatError.
    """
    opaque = Opaque()
    decode = _Decoder(tensors).decode

    def decode_any(name: str, value: Any) -> Any:
        return opaque if name == "$opaque" else decode(name, value)

    return decode_json(text, Section.TREE, tensors, decode_any)


def find_metadata(
    text: bytes, prefix: str, tensor_count: int
) -> tuple[OrderedDict[str, Any] | None, str]:
    """The `_metadata` of the state_dict in a tree that a prefix of tensor names leads to.

    Also what is left of the prefix there: modules in that state_dict. No tensor is made. Raises
    FormatError.
    """
    stand_ins = [_StandIn() for _ in range(tensor_count)]
    value = decode_json(text, Section.TREE, stand_ins, _Outliner().decode)
    while True:
        metadata = getattr(value, "__dict__", {}).get("_metadata")
        if type(metadata) is OrderedDict:
            return metadata, prefix
        steps = [(f"{key}.", inner) for key, inner in _list_inner(value)]
        fitting = [step for step in steps if prefix.startswith(step[0])]
        if not fitting:
            return None, prefix
        name, value = max(fitting, key=lambda step: len(step[0]))
        prefix = prefix[len(name) :]


def _list_inner(value: object) -> Iterable[tuple[object, Any]]:
    if isinstance(value, dict):
        return ((key, inner) for key, inner in value.items() if type(key) in (str, int))
    return enumerate(value) if isinstance(value, (list, tuple)) else ()


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


class _Decoder:
    """Turns the nodes of the tree into values, innermost first, as the JSON parser meets them.

    `$tensor` is not among them: the parser finds the tensor itself.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        self._decoders = _DECODERS
        self._defined: dict[int, Any] = {}
        self._unhashable: dict[int, Any] = {}  # tuples that share what is in them, by identity

    def decode(self, name: str, value: Any) -> Any:
        return self._decoders[name](self, value)

    def _decode_def(self, node: Any) -> Any:
        number, value = _expect(node, list)
        if _expect(number, int) in self._defined or type(value) not in _CONTAINERS:
            raise ValueError(f"value {number} is defined twice, or is a {type(value).__name__}")
        self._defined[number] = value
        if type(value) in (tuple, frozenset):
            self._unhashable[id(value)] = value
        return value

    def _decode_ref(self, number: Any) -> Any:
        return self._defined[_expect(number, int)]

    def _decode_tuple(self, node: Any) -> Any:
        value = tuple(_expect(node, list))
        if any(id(element) in self._unhashable for element in value):
            self._unhashable[id(value)] = value
        return value

    def _check_keys(self, keys: Iterable[Any]) -> None:
        # Such a key would take longer to hash than anyone can wait; see _encode_key.
        if self._unhashable and any(id(key) in self._unhashable for key in keys):
            raise ValueError("a key or an element of a set shares what is in it")

    def _decode_set(self, node: Any) -> set[Any]:
        self._check_keys(_expect(node, list))
        return set(node)

    def _decode_frozenset(self, node: Any) -> frozenset[Any]:
        return frozenset(self._decode_set(node))

    def _decode_dict(self, node: Any) -> Any:
        return self._to_dict(dict, _expect(node, list))

    def _decode_ordered_dict(self, node: Any) -> Any:
        return self._to_dict(OrderedDict, node)

    def _to_dict(self, kind: type[dict[Any, Any]], items: Any) -> Any:
        if type(items) is not dict:
            items = [tuple(_expect(pair, list)) for pair in _expect(items, list)]
            self._check_keys(key for key, _ in items)
        result = kind(items)
        if len(result) != len(items):
            raise ValueError("a key occurs twice in a dictionary")
        return result

    def _decode_attributes(self, node: Any) -> Any:
        value, items = _expect(node, list)
        if type(value) not in _HAVE_ATTRIBUTES:
            raise TypeError(f"a {type(value).__name__} has no attributes")
        attributes = self._to_dict(dict, items)
        check_attributes(value, attributes)
        vars(value).update(attributes)  # and not setattr, which runs what the class has to say
        return value

    def _decode_tensor(self, number: Any) -> torch.Tensor:
        index: int = _expect(number, int)
        if index < 0:
            raise IndexError(index)
        return self._tensors[index]

    def _decode_array(self, node: Any) -> np.ndarray:
        array = to_array(self._decode_tensor(_expect(node, list)[0]))
        if len(node) == 1:
            return array
        _, descr, shape = node
        if array.dtype != np.uint8 or array.ndim != 1:
            raise TypeError(f"expected bytes, found {array.ndim} dimensions of {array.dtype}")
        return _from_bytes(array.tobytes(), _restore_dtype(descr), shape)


class _StandIn:
    """For a tensor, where only what is around it matters."""


_HAVE_ATTRIBUTES = {OrderedDict, *_TENSOR_TYPES, _StandIn}


class _Outliner(_Decoder):
    """Gives the values of a tree without its tensors and arrays."""

    def __init__(self) -> None:
        super().__init__([])
        self._decoders = _DECODERS | {"$ndarray": lambda *_: np.empty(0)}


def _restore_dtype(descr: Any) -> np.dtype[Any]:
    return np.dtype(np.lib.format.descr_to_dtype(_to_description(descr)))


# Only what numpy itself writes: its parser also takes expressions, and divides by what they say.
_NUMPY_DTYPE = re.compile(
    r"[<>|][biufcSUVmM]\d{1,9}(\[\d{0,9}(generic|[YMWDhms]|ms|us|ns|ps|fs|as)\])?"
)


def _to_description(descr: Any) -> Any:
    """A checked description of a dtype, with the tuples that JSON has made lists."""
    if not isinstance(descr, list):
        if not _NUMPY_DTYPE.fullmatch(_expect(descr, str)):
            raise ValueError(f"{descr!r} describes no dtype")
        return descr
    fields = []
    for name, dtype, *shape in descr:
        title_and_name = tuple(name) if isinstance(name, list) else name
        fields.append((title_and_name, _to_description(dtype), *map(tuple, shape)))
    return fields


def _from_bytes(data: bytes, dtype: np.dtype[Any], shape: Any) -> np.ndarray:
    sizes = _to_sizes(shape)
    if dtype.itemsize == 0:  # such as an empty string: no bytes tell how many there are
        return np.ndarray(sizes, dtype)  # np.zeros would give strings of one character
    return np.frombuffer(bytearray(data), dtype).reshape(sizes)


def _to_scalar(_: _Decoder, node: Any) -> Any:
    descr, text = _expect(node, list)
    return _from_bytes(_to_bytes(text), _restore_dtype(descr), [])[()]


def _to_bytes(text: Any) -> bytes:
    return base64.b64decode(_expect(text, str), validate=True)


def _to_int(text: Any) -> int:
    if not re.fullmatch("-?0x[0-9a-fA-F]+", _expect(text, str)):
        raise ValueError(f"{text!r} is no hexadecimal number")
    return int(text, 16)


def _to_float(text: Any) -> float:
    value: float = struct.unpack(">d", bytes.fromhex(_expect(text, str)))[0]
    return value


def _to_complex(parts: Any) -> complex:
    real, imaginary = _expect(parts, list)
    return complex(_to_float(real), _to_float(imaginary))


def _to_sizes(sizes: Any) -> list[int]:
    if any(not -1 < _expect(size, int) < 2**63 for size in _expect(sizes, list)):
        raise ValueError(f"{sizes} are no sizes")
    return list(sizes)


def _named(kind: type) -> Callable[[_Decoder, Any], Any]:
    # Looked up here and not with getattr, for which torch imports whatever module has the name.
    values = {name: value for name, value in vars(torch).items() if type(value) is kind}
    return lambda _, name: values[_expect(name, str)]


def _to_return_type(_: _Decoder, node: Any) -> Any:
    name, values = _expect(node, list)
    kind = vars(torch.return_types)[_expect(name, str)]
    if not (isinstance(kind, type) and issubclass(kind, tuple)):
        raise TypeError(f"torch.return_types.{name} is no named tuple")
    return kind(_expect(values, list))


_DECODERS: dict[str, Callable[[_Decoder, Any], Any]] = {
    "$def": _Decoder._decode_def,
    "$ref": _Decoder._decode_ref,
    "$attributes": _Decoder._decode_attributes,
    "$ndarray": _Decoder._decode_array,
    "$numpy": _to_scalar,
    "$str": lambda _, text: _to_bytes(text).decode("utf-8", "surrogatepass"),
    "$int": lambda _, text: _to_int(text),
    "$float": lambda _, text: _to_float(text),
    "$complex": lambda _, parts: _to_complex(parts),
    "$bytes": lambda _, text: _to_bytes(text),
    "$bytearray": lambda _, text: bytearray(_to_bytes(text)),
    "$tuple": _Decoder._decode_tuple,
    "$Size": lambda _, sizes: torch.Size(_to_sizes(sizes)),
    "$return_type": _to_return_type,
    "$set": _Decoder._decode_set,
    "$frozenset": _Decoder._decode_frozenset,
    "$dict": _Decoder._decode_dict,
    "$OrderedDict": _Decoder._decode_ordered_dict,
    "$dtype": _named(torch.dtype),
    "$device": lambda _, name: torch.device(_expect(name, str)),
    "$layout": _named(torch.layout),
    "$memory_format": _named(torch.memory_format),
}
