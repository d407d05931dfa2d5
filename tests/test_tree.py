"""Plain values and how they nest: all that DESIGN's list names comes back, without a pickle."""

import io
import re
import struct
from collections import OrderedDict

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from same import PLAIN_DTYPES, all_dtypes, assert_same, filled, through_memory, through_torch

import fastsd


def nan(pattern):
    """A float whose 64 bits are the given ones."""
    return struct.unpack(">d", struct.pack(">Q", pattern))[0]


VALUES = {
    "None": None,
    "true": True,
    "false": False,
    "zero": 0,
    "small ints": [1, -1, 2**31, -(2**31), 2**53 - 1, 2**53, 2**53 + 1, -(2**53) - 1],
    "64-bit ints": [2**63 - 1, 2**63, -(2**63), 2**64],
    "huge ints": [10**5000, -(7**4001)],
    "floats": [0.0, -0.0, 0.1, 1e308, 5e-324, 1.0, 1e22, 2.0**53, 123456789.12345678],
    "not finite": [float("inf"), -float("inf"), float("nan")],
    "nan payloads": [nan(0x7FF8000000001234), nan(0xFFF8000000000000), nan(0x7FF0000000000001)],
    "complex": [1j, complex(-0.0, -0.0), complex("nan+infj"), complex(nan(0xFFF8000000000007), 1)],
    "strings": ["", "text", "ключ", "🔑", "\0\n\t\x7f\u2028", '"\\', "$tensor"],
    "lone surrogates": ["\ud800", "a\udfffb", "\udc00\ud800", "\ud83d\ude00"],
    "bytes": [b"", b"\0\xff", bytes(range(256))],
    "bytearray": bytearray(b"\0abc"),
    "list": [1, [2, [3, []]]],
    "tuple": (1, (2, (3, ())), [()]),
    "sizes": [torch.Size([]), torch.Size([2, 3]), torch.Size([2**40, 0])],
    "set": {1, "a", b"b", None, (1, 2), frozenset([3, frozenset()])},
    "empty sets": [set(), frozenset()],
    "frozenset": frozenset([1.5, 2j, "x"]),
    "dict": {"a": {"b": {"c": {}}}},
    "ordered dict": OrderedDict([("z", 1), ("a", OrderedDict())]),
    "dtypes": all_dtypes(),
    "devices": [torch.device(d) for d in ("cpu", "cpu:0", "cuda", "cuda:3", "meta", "mps")],
    "layouts": [torch.strided, torch.sparse_coo, torch.sparse_csr, torch.jagged, torch._mkldnn],
    "memory formats": [
        torch.contiguous_format,
        torch.channels_last,
        torch.channels_last_3d,
        torch.preserve_format,
    ],
    "nothing in a list": [None, [], (), {}, set(), "", b""],
}


# Torch refuses to save these; it also forgets the byte order of numpy arrays.
TORCH_DTYPES = [
    dtype for dtype in PLAIN_DTYPES if not re.fullmatch(r"torch\.u?int[1-7]", str(dtype))
]
NOT_IN_TORCH = {"memory formats"}


@pytest.mark.parametrize("name", VALUES)
def test_plain_values(name, round_trip):
    value = VALUES[name]
    assert_same(round_trip(value), value)
    nested = {"nested": [value, {"again": (value,)}]}
    loaded = round_trip(nested)
    assert_same(loaded, nested)
    if name not in NOT_IN_TORCH:
        assert_same(loaded, through_torch(nested))


def test_a_training_checkpoint(round_trip):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "epoch": 3,
        "best": float("inf"),
        "rng": torch.get_rng_state(),
        "config": {"layers": (3, 2), "dtype": torch.float32, "name": None},
    }
    loaded = round_trip(checkpoint)
    assert_same(loaded, checkpoint)
    optimizer.load_state_dict(loaded["optimizer"])


# ---- Keys ----

KEYS = {
    "ints": {0: "a", -1: "b", 10**30: "c"},
    "bools": {True: 1, False: 2},
    "floats": {0.5: 1, -0.0: 2, float("inf"): 3, float("nan"): 4},
    "None": {None: 1},
    "bytes": {b"a": 1, "a": 2},
    "tuples": {(): 0, (1,): 1, (1, (2, "x")): 2},
    "complex": {1j: 1},
    "frozensets": {frozenset([1, 2]): 1},
    "torch's": {torch.float32: 1, torch.device("cpu"): 2, torch.strided: 3, torch.Size([1]): 4},
    "numpy's": {np.int64(3): 1, np.str_("x"): 2},
    "mixed": {"a": 1, 1: "a", None: {2: 3}, 2.5: {"x": {b"y": 1}}},
    "dollars": {"$tensor": 0, "$def": [0, 1]},
    "one dollar": {"$tensor": 0},
    "an unknown dollar": {"$": {"$x": {"$$": []}}},
    "a dollar alone in an ordered dict": OrderedDict([("$OrderedDict", {})]),
    "lone surrogates": {"\ud800": 1, "\ud83d\ude00": 2, "\U0001f600": 3},
    "dots": {"a.b": {"c": torch.ones(1)}, "a": {"b.c": torch.zeros(1), "b": {"c": torch.ones(2)}}},
}


@pytest.mark.parametrize("kind", [dict, OrderedDict])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_any_plain_key(keys, kind, round_trip):
    obj = kind(keys)
    assert_same(round_trip(obj), obj)
    with_tensors = kind((key, torch.tensor(i)) for i, key in enumerate(keys))
    assert_same(round_trip(with_tensors), with_tensors)


def test_keys_keep_their_order(round_trip):
    obj = {"x": {str(i): i for i in range(100, 0, -1)}, "y": dict.fromkeys(range(50, 0, -1))}
    assert_same(round_trip(obj), obj)


# ---- The same object in several places ----


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        {"a": 1},
        OrderedDict(a=1),
        {1, 2},
        frozenset([1, 2]),
        (1, [2]),
        bytearray(b"x"),
        np.arange(3),
        np.arange(3, dtype=">i4"),
        np.arange(9)[::-2],
        torch.ones(3),
        torch.nn.Parameter(torch.ones(3)),
        torch.empty(0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_object_in_two_places_is_one_object_again(value, round_trip):
    loaded = round_trip({"a": [value, (1, value)], "b": {"c": value}})
    assert_same(loaded, {"a": [value, (1, value)], "b": {"c": value}})
    assert loaded["a"][0] is loaded["a"][1][1]
    assert loaded["a"][0] is loaded["b"]["c"]


def test_equal_objects_stay_apart(round_trip):
    loaded = round_trip([[1], [1], torch.ones(1), torch.ones(1)])
    assert loaded[0] is not loaded[1]
    assert loaded[2] is not loaded[3]


def test_an_object_shared_at_several_depths(round_trip):
    inner = {"w": torch.ones(2)}
    middle = [inner, inner]
    obj = {"first": middle, "second": (middle, inner), "third": {"x": middle}}
    loaded = round_trip(obj)
    assert_same(loaded, obj)
    loaded["third"]["x"][1]["w"].zero_()
    assert loaded["first"][0]["w"].sum() == 0


def test_a_tuple_shared_by_members_of_a_set(round_trip):
    shared = ("x", ("y",))
    for count in range(2, 20):
        members = {(i, shared) for i in range(count)} | {(str(i), shared) for i in range(count)}
        assert round_trip([members, shared]) == [members, shared]


def test_a_set_shared_by_attributes_and_keys(round_trip):
    shared = frozenset([1, 2])
    state = OrderedDict([((shared, 1), shared)])
    state.note = [shared]
    loaded = round_trip(state)
    assert_same(loaded, state)
    assert loaded.note[0] is next(iter(loaded.values()))


# ---- numpy ----

RECORD = np.dtype(
    [("a", "<i4"), ("b", ">f8", (2,)), ("c", [("x", "u1"), ("y", "S3"), ("z", "<U2")])]
)
NATIVE = ["bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
OTHER = [
    ">i2",
    ">u4",
    ">f8",
    ">c16",
    "g",
    "G",
    "S5",
    "U3",
    ">U3",
    "V4",
    "M8[ns]",
    ">M8[D]",
    "m8[s]",
]
LAYOUTS = {
    "C": lambda a: a,
    "F": np.asfortranarray,
    "transposed": lambda a: a.transpose(1, 0, 2),
    "backwards": lambda a: a[::-1],
    "backwards inside": lambda a: a[:, :, ::-2],
    "stepped": lambda a: a[::2, 1:, ::3],
    "empty": lambda a: a[:0],
    "broadcast": lambda a: np.broadcast_to(a[0, 0], (3, *a[0, 0].shape)),
    "0-dim": lambda a: a[1, 1, 1, ...],
    "one item": lambda a: a[1:2, 1:2, 1:2],
}


def an_array(dtype):
    """4 x 3 x 6 items with bytes of their own."""
    dtype = np.dtype(dtype)
    raw = np.arange(4 * 3 * 6 * dtype.itemsize) % (2 if dtype.kind == "b" else 97)
    return raw.astype(np.uint8).view(dtype).reshape(4, 3, 6)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [*NATIVE, ">f4", "S5", RECORD], ids=str)
def test_numpy_arrays(dtype, layout, round_trip):
    array = layout(an_array(dtype))
    assert_same(round_trip([array, array.copy()]), [array, array.copy()])


@pytest.mark.parametrize("dtype", OTHER, ids=str)
def test_numpy_dtypes_that_torch_lacks(dtype, round_trip):
    array = np.zeros((4, 3, 6), dtype) if dtype.endswith("U3") else an_array(dtype)
    loaded = round_trip({"array": array})
    assert_same(loaded, {"array": array})


@pytest.mark.parametrize(
    "dtype",
    [
        RECORD,
        [("a", "u1"), ("b", "<M8[s]")],
        [(("a title", "a"), "<i4")],
        [],
        np.dtype([("a", "u1"), ("b", "f8"), ("c", "i2")], align=True),
        {"names": ["a", "b"], "formats": ["u1", "f4"], "offsets": [3, 10], "itemsize": 20},
        {"names": ["b", "a"], "formats": ["f4", "i4"], "offsets": [4, 0]},
        {"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [0, 2]},
        "V0",
        "S0",
    ],
    ids=str,
)
def test_structured_numpy_dtypes_come_back(dtype, path):
    array = np.zeros(3, dtype)
    fastsd.save({"key": [array]}, path)
    assert_same(fastsd.load(path, weights_only=False), {"key": [array]})


def test_numpy_arrays_are_writable_and_keep_their_strides(round_trip):
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    array.flags.writeable = False
    loaded = round_trip({"array": array})["array"]
    assert loaded.strides == array.strides
    loaded[0, 0] = 7
    assert array[0, 0] == 0


SCALARS = [
    *(np.dtype(dtype).type(1) for dtype in NATIVE),
    np.float32("nan"),
    np.float64(-0.0),
    np.longdouble("1.1"),
    np.str_("текст"),
    np.str_(""),
    np.bytes_(b"a\0b"),
    np.bytes_(b""),
    np.datetime64("2020-01-01T00:00", "ns"),
    np.datetime64("NaT"),
    np.timedelta64(3, "h"),
    np.zeros(1, RECORD)[0],
    np.void(b"abc"),
    np.array([1.5], ">f4")[0],
]


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: scalar.dtype.str + repr(scalar)[-9:])
def test_numpy_scalars(scalar, round_trip):
    assert_same(round_trip({"scalar": scalar}), {"scalar": scalar})


def test_numpy_strings_of_variable_length_come_back(path):
    dtypes = getattr(np, "dtypes", None)
    if not hasattr(dtypes, "StringDType"):
        pytest.skip("this numpy has none")
    array = np.array(["short", "long" * 50], dtype=dtypes.StringDType())
    fastsd.save({"key": [array]}, path)
    assert_same(fastsd.load(path, weights_only=False), {"key": [array]})


# ---- Torch's named tuples ----


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.rand(2, 3).max(0),
        lambda: torch.linalg.qr(torch.rand(3, 3)),
        lambda: torch.rand(4).sort(),
        lambda: torch.linalg.slogdet(torch.rand(2, 2)),
    ],
    ids=["max", "qr", "sort", "slogdet"],
)
def test_return_types(make, round_trip):
    result = make()
    obj = {"result": result, "values": result[0], "nested": [(result,)]}
    loaded = round_trip(obj)
    assert_same(loaded, obj)
    assert loaded["result"][0] is loaded["values"]


# ---- Trees ----

NESTINGS = {
    "list": lambda v: [v],
    "tuple": lambda v: (v,),
    "dict": lambda v: {"key": v},
    "dict of ints": lambda v: {1: v},
    "OrderedDict": lambda v: OrderedDict(key=v),
    "attribute": lambda v: with_attribute(OrderedDict(key=1), v),
}


def with_attribute(container, value):
    container.attribute = value
    return container


def unwrap(value):
    if isinstance(value, OrderedDict) and value.__dict__:
        return value.attribute
    (inner,) = value.values() if isinstance(value, dict) else value
    return inner


@pytest.mark.parametrize(
    "kind", [lambda v: [v], lambda v: (v,), lambda v: {"k": v}, lambda v: {1: v}]
)
@pytest.mark.parametrize("depth", [10, 50, 100])
def test_deep_nesting(kind, depth, round_trip):
    obj = torch.ones(1)
    for _ in range(depth):
        obj = kind(obj)
    loaded = round_trip(obj)
    for _ in range(depth):
        loaded = unwrap(loaded)
    assert loaded.tolist() == [1.0]


@pytest.mark.parametrize(
    "kind", [lambda v: [v], lambda v: (v,), lambda v: {"k": v}, lambda v: {1: v}]
)
@pytest.mark.parametrize("depth", [200, 240, 280, 320, 400, 1000, 100_000])
def test_deeper_nesting_is_loaded_or_was_refused(kind, depth, path):
    obj = 1
    for _ in range(depth):
        obj = kind(obj)
    try:
        fastsd.save(obj, path)
    except RecursionError:  # torch's own answer
        assert not path.exists()
        with pytest.raises(RecursionError):
            torch.save(obj, io.BytesIO())
        return
    loaded = fastsd.load(path)
    for _ in range(depth):
        loaded = unwrap(loaded)
    assert loaded == 1


def test_many_values(round_trip):
    obj = {"values": [{"i": i, "x": (i / 7, str(i))} for i in range(20_000)]}
    assert_same(round_trip(obj), obj)


# ---- Whatever Hypothesis thinks of ----

texts = st.text(st.characters(exclude_categories=()), max_size=8)


def arrays(byte_orders):
    dtypes = st.one_of(
        npst.boolean_dtypes(),
        *(
            make(endianness=byte_orders)
            for make in (
                npst.integer_dtypes,
                npst.unsigned_integer_dtypes,
                npst.floating_dtypes,
                npst.complex_number_dtypes,
                npst.datetime64_dtypes,
                npst.timedelta64_dtypes,
                npst.byte_string_dtypes,
                npst.unicode_string_dtypes,
            )
        ),
    )
    structured = npst.array_dtypes(dtypes, max_size=3, allow_subarrays=True)
    shapes = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    return npst.arrays(st.one_of(dtypes, structured), shapes)


def tensors(dtypes):
    shapes = st.lists(st.integers(0, 4), max_size=3)
    return st.builds(filled, shapes, st.sampled_from(dtypes), st.integers(0, 5))


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.complex_numbers(),
    texts,
    st.binary(max_size=8),
    st.builds(bytearray, st.binary(max_size=8)),
    st.sampled_from(all_dtypes() + VALUES["devices"] + VALUES["layouts"]),
    st.lists(st.integers(0, 2**40), max_size=3).map(torch.Size),
)
# Without NaN, of which a set may hold several that look the same.
hashables = st.one_of(
    st.none(), st.integers(), texts, st.binary(max_size=4), st.tuples(st.integers(), texts)
)
keys = st.one_of(texts, hashables, st.floats(allow_nan=False))


def grow(trees):
    # Pairs rather than st.dictionaries, which names the whole strategy, at length, in a warning.
    pairs = st.lists(st.tuples(keys, trees), max_size=4)
    return st.one_of(
        st.lists(trees, max_size=4),
        st.lists(trees, max_size=4).map(tuple),
        st.lists(st.tuples(texts, trees), max_size=4).map(dict),
        pairs.map(dict),
        pairs.map(OrderedDict),
        st.sets(hashables, max_size=4),
        st.frozensets(hashables, max_size=4),
        trees.map(lambda tree: [tree, {"again": tree}]),
    )


@given(st.recursive(st.one_of(scalars, arrays("?"), tensors(PLAIN_DTYPES)), grow, max_leaves=20))
def test_any_tree_comes_back(tree):
    assert_same(through_memory(tree), tree)


@given(st.recursive(st.one_of(scalars, arrays("="), tensors(TORCH_DTYPES)), grow, max_leaves=20))
def test_any_tree_is_what_torch_makes_of_it(tree):
    assert_same(through_memory(tree), through_torch(tree))


@given(st.dictionaries(texts, tensors(PLAIN_DTYPES)), st.booleans())
def test_any_flat_dictionary_comes_back(state, is_ordered):
    state = OrderedDict(state) if is_ordered else state
    assert_same(through_memory(state), state)


@given(npst.scalar_dtypes().flatmap(npst.from_dtype))
def test_any_numpy_scalar_comes_back(scalar):
    assert_same(through_memory({"scalar": scalar}), {"scalar": scalar})
