"""The core's JSON parser gives what Python's json gives, or refuses what that refuses."""

import gc
import json
import random
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsd import _core

TENSORS = [object(), object()]


def parse(text, decode=None):
    return _core.parse_json(text, TENSORS, decode)


def unique(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name occurs twice")
    return value


def expected(text):
    """What Python's json makes of it, or None if that is an error."""
    try:
        return [json.loads(text.decode(), object_pairs_hook=unique, parse_constant=int)]
    except (ValueError, RecursionError):
        return None


def found(text):
    try:
        return [parse(text)]
    except (ValueError, RecursionError):
        return None


def assert_as_expected(text):
    """The same values of the same types, in the same order: repr tells 1, 1.0 and True apart."""
    assert repr(found(text)) == repr(expected(text))


# ---- Against Python's json ----

texts = st.text(st.characters(exclude_categories=()), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=5) | st.dictionaries(texts, v, max_size=5)
)


@st.composite
def json_texts(draw):
    """A value as one of its texts; lone surrogates need escapes."""
    value = draw(values)
    separators = draw(st.sampled_from([(",", ":"), (" ,\n", "\t: ")]))
    try:
        return json.dumps(value, ensure_ascii=draw(st.booleans()), separators=separators).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=separators).encode()


@given(json_texts())
def test_any_value(text):
    assert_as_expected(text)


@given(st.binary(max_size=30))
def test_any_bytes(text):
    assert_as_expected(text)


@given(st.text('{}[]",:\\u0dDabefnrtl1-+.E \n$é\0', max_size=20))
def test_any_text_of_what_json_is_made_of(text):
    assert_as_expected(text.encode())


@given(json_texts(), st.integers(0, 2**32))
def test_damaged_texts(text, seed):
    pick = random.Random(seed)
    damaged = bytearray(text)
    for _ in range(pick.randint(1, 4)):
        at = pick.randint(0, len(damaged))
        damaged[at : at + pick.randint(0, 2)] = pick.choice(
            [b"", b'"', b"\\", b",", b"[", b"}", b"0", b"-", b".", b"e", b"\xed\xa0\x80", b"\xc3"]
        )
    assert_as_expected(bytes(damaged))


@given(
    st.from_regex(r"-?([0-9]{1,25})?(\.[0-9]{0,25})?([eE][+-]?[0-9]{0,3})?", fullmatch=True)
    | st.integers(0, 2**64 - 1).map(
        lambda bits: repr(struct.unpack("<d", struct.pack("<Q", bits))[0])
    )
)
def test_any_number(text):
    assert_as_expected(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        *("0", "-0", "-0.0", "0e0", "1E+2", "1e-0", "9007199254740993", "9007199254740993.0"),
        *("999999999999999999", "-999999999999999999", "1000000000000000000", str(2**63)),
        *("1e23", "8.5e22", "0.1", "123456789.12345678", "1e400", "-1e400", "1e-400", "-1e-400"),
        *("2.2250738585072011e-308", "2.2250738585072014e-308", "4.9e-324", "2.47e-324"),
        *("2.4703282292062327e-324", "2.4703282292062328e-324", "1.7976931348623157e308"),
        *("1.7976931348623158e308", "1.7976931348623159e308", "0." + "0" * 400 + "1e400"),
        *("9" * 5000 + "e-4000", "0." + "3" * 100_000, "1e99999999999999999999"),
        *("1" + "0" * 4299, "1" + "0" * 4300, "-" + "1" * 4300),
    ],
    ids=lambda text: text[:24],
)
def test_numbers_at_the_edges(text):
    assert_as_expected(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        *(r'"\"\\\/\b\f\n\r\t"', r'"\u0041\u00e9\u20AC\uD83D\uDE00"', r'"\ud83d\ud83d\ude00"'),
        *(r'"\ud800"', r'"\udc00\ud800"', r'"\ud800x"', r'"\ud800\n"', r'"\ud83d\u0041"'),
        *('"é\\n€😀"', '"é\\ud800"', '"\x7f\x80\u07ff\u0800\uffff\U0010ffff"'),
        *(r'"\ud83d\u"', r'"\u"', r'"\u12"', r'"\uD83G"', r'"\x41"', r'"\U0041"', '"\\', '"\\"'),
    ],
)
def test_strings(text):
    assert_as_expected(text.encode())


@pytest.mark.parametrize(
    "raw",
    [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80", b"\x1f"],
)
@pytest.mark.parametrize("around", [b"%b", b"a%bz", rb"\ud800%b", rb"%b\n", rb"\u00e9%b\ud800"])
def test_strings_that_are_no_utf8(raw, around):
    text = b'["' + around.replace(b"%b", raw) + b'"]'
    assert expected(text) is None
    with pytest.raises(ValueError, match="at byte"):
        parse(text)


def test_names_beyond_what_is_remembered():
    """Of all lengths, more than are remembered, in orders that make them replace each other."""
    names = [f"{'n' * (i % 100)}{i}" for i in range(2000)]
    random.Random(0).shuffle(names)
    value = [{name: i, "again": 0} for i, name in enumerate(names * 2)]
    assert parse(json.dumps(value).encode()) == value


def test_a_name_is_one_string_wherever_it_occurs():
    first, second = parse(b'[{"name": 1}, {"name": 2}]')
    assert next(iter(first)) is next(iter(second))


def test_no_name_occurs_twice():
    for text in (b'{"a":1,"a":1}', rb'{"a":1,"\u0061":2}', b'[{"x":{"b":0,"c":1,"b":2}}]'):
        with pytest.raises(ValueError, match="a name occurs twice"):
            parse(text)


@pytest.mark.parametrize(("left", "right"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"":', b"}]")])
def test_nesting_has_a_limit(left, right):
    depth = 2000 // len(right)
    inner = parse(left * depth + b"1" + right * depth)
    while inner != 1:
        (inner,) = inner.values() if isinstance(inner, dict) else inner
    for text in (left * depth + b"[]" + right * depth, left * 10**6):
        with pytest.raises(RecursionError, match="at byte"):
            parse(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b"", 0),
        (b"  x", 2),
        (b"[1, 2", 5),
        (b'{"a" 1}', 5),
        (b'{"a":1,}', 7),
        (b"{} x", 3),
        (b"[tru]", 1),
        (b'["\\q"]', 2),
        (b"[1.]", 3),
        (b"[1\0]", 2),
        (b'["a\0"]', 3),
    ],
)
def test_errors_name_the_place(text, place):
    with pytest.raises(ValueError, match=f"at byte {place}$"):
        parse(text)


# ---- Nodes ----


def test_nodes_are_decoded_innermost_first():
    met = []

    def decode(name, value):
        met.append((name, value))
        return len(met)

    text = rb'{"$a":[{"$b":{"$c":"x"}},{"d":{"\u0024e":null}}]}'
    assert parse(text, decode) == 4
    assert met == [("$c", "x"), ("$b", 1), ("$e", None), ("$a", [2, {"d": 3}])]


def test_only_a_single_member_with_a_dollar_makes_a_node():
    for text in (b"{}", b'{"":1}', b'{"a":1}', b'{"a$":1}', b'{"$a":1,"b":2}', b'{"b":1,"$a":2}'):
        assert parse(text, pytest.fail) == json.loads(text)


def test_without_a_decoder_there_are_no_nodes():
    for text in (b'{"$tensor":0}', b'[{"$":{"$x":"$y"}}]'):
        assert parse(text) == json.loads(text)


def test_tensors_are_found_by_number():
    found = parse(rb'[{"$tensor":1},{"$tensor": 0 },{"\u0024tensor":1}]', pytest.fail)
    assert [TENSORS.index(tensor) for tensor in found] == [1, 0, 1]


@pytest.mark.parametrize(
    "number", ["-1", "2", "1.0", "true", "null", '"0"', "[0]", "{}", "9" * 30, "-" + "9" * 30]
)
def test_numbers_of_tensors_are_checked(number):
    with pytest.raises(ValueError, match="tensor"):
        parse(b'{"$tensor":%b}' % number.encode(), pytest.fail)


def test_errors_of_the_decoder_pass_through():
    def decode(name, value):
        raise KeyError(name)

    with pytest.raises(KeyError, match=r"\$x"):
        parse(b'[1,{"a":[2,{"$x":3}]}]', decode)


# ---- What is left behind ----

EVERYTHING = (
    r'[1, -2.5e300, 12345678901234567890, "text é \n \ud800", null, {"a": {"b": [true, []]}, "é": {'
    r'"$tensor": 1}}, {"$node": [0.5, {"$other": {"n": [300, 400]}}]}, {"a": 1, "b": {}, "c": "d"}]'
).encode()


def try_all(decode):
    """Every text that is EVERYTHING cut short, or with one byte of it changed."""
    assert expected(EVERYTHING)
    refused = 0
    for i in range(len(EVERYTHING)):
        for text in (
            EVERYTHING[:i],
            EVERYTHING[:i] + b"\xff" + EVERYTHING[i + 1 :],
            EVERYTHING[:i] + b'"' + EVERYTHING[i:],
        ):
            try:
                parse(text, decode)
            except ValueError:
                refused += 1
    return refused


def refuse_others(name, value):
    if name == "$other":
        raise ValueError(value)
    return value


@pytest.mark.parametrize("decode", [lambda name, value: value, refuse_others, None])
def test_no_reference_is_kept(decode):
    assert try_all(decode) > 2 * len(EVERYTHING)
    gc.collect()
    blocks, references = sys.getallocatedblocks(), sys.getrefcount(TENSORS[1])
    try_all(decode)
    gc.collect()
    more_blocks = sys.getallocatedblocks() - blocks
    more_references = sys.getrefcount(TENSORS[1]) - references
    assert more_blocks < len(EVERYTHING) // 2
    assert more_references == 0


def test_collecting_garbage_is_paused_and_goes_on():
    states = []

    def decode(name, value):
        states.append(gc.isenabled())

    assert gc.isenabled()
    parse(b'{"$x":0}', decode)
    assert gc.isenabled()
    found(b"[")
    assert gc.isenabled()
    gc.disable()
    try:
        parse(b'{"$x":0}', decode)
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert states == [False, False]
