"""Two files compared: torch is the oracle for every number."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastsd
from fastsd import _core
from fastsd import diff as diff_module
from fastsd.diff import compare

DTYPES = [getattr(torch, name) for _, name, _ in _core.DTYPES if hasattr(torch, name)]
SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.fixture
def compare_states(tmp_path):
    def save_and_compare(a, b, **options):
        fastsd.save(a, tmp_path / "a.fsd")
        fastsd.save(b, tmp_path / "b.fsd")
        return compare(tmp_path / "a.fsd", tmp_path / "b.fsd", **options)

    return save_and_compare


@pytest.fixture
def compare_tensors(compare_states):
    def save_and_compare(a, b, **options):
        found = compare_states({"x": a}, {"x": b}, **options)
        (tensor,) = found.tensors
        return found, tensor

    return save_and_compare


def make(dtype, shape=(3, 5)):
    count = math.prod(shape) * dtype.itemsize
    raw = torch.arange(count, dtype=torch.uint8).remainder(2 if dtype == torch.bool else 61)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_equals_itself_bit_by_bit(compare_tensors, dtype):
    found, tensor = compare_tensors(make(dtype), make(dtype))
    assert found.is_equal
    assert tensor.bit_identical
    assert tensor.differing == tensor.outside == tensor.nonfinite == 0
    assert tensor.elements == 15


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bit_is_found_in_every_dtype(compare_tensors, dtype):
    b = make(dtype).clone() if dtype.itemsize > 1 else make(torch.uint8).clone().view(dtype)
    raw = b.view(torch.uint8)
    raw[1, 0] ^= 1
    a = make(dtype) if dtype != torch.bool else make(torch.uint8).remainder(2).view(dtype)
    if dtype == torch.bool:
        b = a.clone()
        b[1, 0] = ~b[1, 0]
    found, tensor = compare_tensors(a, b)
    assert not found.is_equal
    assert found.different == ["x"]
    assert not tensor.bit_identical
    assert tensor.differing == tensor.outside == 1


@pytest.mark.parametrize("a", REAL + FLOAT8 + SIGNED + UNSIGNED, ids=str)
@pytest.mark.parametrize("b", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_floating_point_is_compared_in_float64(compare_tensors, a, b):
    x = torch.arange(-6, 9).abs().to(torch.float32).to(a)
    y = (torch.arange(-6, 9).abs() * 1.25).to(torch.float32).to(b)
    _, tensor = compare_tensors(x, y)
    gap = (x.to(torch.float64) - y.to(torch.float64)).abs()
    assert tensor.compared_as == "float64"
    assert tensor.differing == int((gap != 0).sum()) > 0
    assert tensor.max_abs == gap.max().item()
    assert tensor.mean_abs == pytest.approx(gap.mean().item())


@given(
    st.lists(
        st.tuples(
            st.floats(width=32, allow_subnormal=True), st.floats(width=32, allow_subnormal=True)
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([0.0, 1e-3, 0.5]),
    st.sampled_from([0.0, 1.0]),
)
def test_any_floats_agree_with_torch(tmp_path_factory, pairs, rtol, atol):
    folder = tmp_path_factory.mktemp("floats")
    a, b = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    fastsd.save({"x": a}, folder / "a.fsd")
    fastsd.save({"x": b}, folder / "b.fsd")
    found = compare(folder / "a.fsd", folder / "b.fsd", rtol=rtol, atol=atol)
    (tensor,) = found.tensors
    a, b = a.double(), b.double()
    exact = torch.isclose(a, b, rtol=0, atol=0, equal_nan=True)
    gap = (a - b).abs()
    gap[exact] = 0.0
    finite = gap[gap.isfinite()]
    assert tensor.differing == int((~exact).sum())
    # isclose() lets an infinite b be close to anything finite.
    close = torch.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True) & gap.isfinite()
    assert tensor.outside == int((~close).sum())
    assert tensor.nonfinite == int((~gap.isfinite()).sum())
    if len(finite):
        assert tensor.max_abs == finite.max().item()
        assert tensor.mean_abs == pytest.approx(finite.mean().item(), rel=1e-9)
    else:
        assert tensor.max_abs is tensor.mean_abs is None
    assert found.is_equal == bool(close.all())
    assert tensor.bit_identical == torch.equal(
        a.float().view(torch.int32), b.float().view(torch.int32)
    )


INTEGERS = {
    torch.int64: st.integers(-(2**63), 2**63 - 1),
    torch.uint64: st.integers(0, 2**64 - 1),
    torch.int8: st.integers(-128, 127),
    torch.bool: st.integers(0, 1),
}


@given(st.data())
def test_integers_are_exact(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("integers")
    columns = []
    for name in "ab":
        dtype = data.draw(st.sampled_from(list(INTEGERS)))
        values = data.draw(st.lists(INTEGERS[dtype], min_size=3, max_size=3))
        fastsd.save({"x": torch.tensor(values, dtype=dtype)}, folder / f"{name}.fsd")
        columns.append(values)
    (tensor,) = compare(folder / "a.fsd", folder / "b.fsd").tensors
    gaps = [abs(x - y) for x, y in zip(*columns, strict=True)]
    assert tensor.differing == sum(gap != 0 for gap in gaps)
    assert tensor.max_abs == max(gaps)
    assert type(tensor.max_abs) is int
    assert tensor.mean_abs == sum(gaps) / 3


def test_common_types_are_said(compare_tensors):
    one = torch.ones(2)
    for a, b, common in [
        (torch.int8, torch.int64, "int64"),
        (torch.bool, torch.uint64, "uint64"),
        (torch.int8, torch.uint64, "integers"),
        (torch.int8, torch.float16, "float64"),
        (torch.bool, torch.complex64, "complex128"),
    ]:
        found, tensor = compare_tensors(one.to(a), one.to(b))
        assert tensor.compared_as == common
        assert (tensor.differing, tensor.bit_identical) == (0, False)
        assert found.different == ["x"]
        found, _ = compare_tensors(one.to(a), one.to(b), ignore_dtypes=True)
        assert found.is_equal


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128], ids=str)
def test_complex_numbers(compare_tensors, dtype):
    nan, inf = math.nan, math.inf
    a = torch.tensor([1 + 1j, 3 + 4j, complex(nan, 1), complex(nan, 1), complex(0, inf)])
    b = torch.tensor([1 + 1j, 0 + 0j, complex(nan, 1), complex(nan, 2), complex(0, inf)])
    _, tensor = compare_tensors(a.to(dtype), b.to(dtype))
    assert tensor.compared_as == "complex128"
    assert (tensor.differing, tensor.nonfinite) == (2, 1)
    assert tensor.max_abs == 5.0
    assert tensor.mean_abs == pytest.approx(5 / 4)


def test_conjugates_are_compared_by_value(compare_tensors):
    x = torch.tensor([1 + 2j, 3 - 4j])
    found, tensor = compare_tensors(x.conj(), x.conj().resolve_conj())
    assert found.is_equal
    assert tensor.bit_identical


def test_differences_do_not_overflow(compare_tensors):
    x = torch.full((1000,), 1.7e308, dtype=torch.float64)
    _, tensor = compare_tensors(x, torch.zeros_like(x))
    assert tensor.max_abs == 1.7e308
    assert tensor.mean_abs == pytest.approx(1.7e308)
    _, tensor = compare_tensors(x, -x)
    assert (tensor.nonfinite, tensor.max_abs, tensor.mean_abs) == (1000, None, None)


def test_zero_and_minus_zero_are_equal_but_not_the_same_bits(compare_tensors):
    found, tensor = compare_tensors(torch.zeros(3), -torch.zeros(3))
    assert found.is_equal
    assert (tensor.differing, tensor.bit_identical) == (0, False)


def test_names_shapes_and_dtypes(compare_states):
    a = {"gone": torch.ones(1), "shape": torch.ones(2, 3), "bits": make(torch.uint4), "same": 1.5}
    b = {"shape": torch.ones(3, 2), "new": torch.ones(1), "bits": make(torch.uint8), "same": 1.5}
    found = compare_states(a, b)
    assert found.only_a == ["gone"]
    assert found.only_b == ["new"]
    assert found.different == ["shape", "bits"]
    shape, bits = found.tensors
    assert (shape.shape_a, shape.shape_b) == ((2, 3), (3, 2))
    assert (bits.dtype_a, bits.dtype_b) == ("uint4", "uint8")
    for tensor in found.tensors:
        assert not tensor.bit_identical
        assert tensor.compared_as is tensor.differing is tensor.max_abs is tensor.mean_abs is None


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_scalars_and_empty_tensors(compare_tensors, shape):
    found, tensor = compare_tensors(torch.ones(shape), torch.ones(shape))
    assert found.is_equal
    assert tensor.bit_identical
    assert tensor.elements == math.prod(shape)


def test_empty_files(compare_states):
    found = compare_states({}, {})
    assert found.is_equal
    assert found.tensors == []


def test_meta_tensors_have_no_values(compare_tensors):
    meta = torch.empty(2, device="meta")
    found, tensor = compare_tensors(meta, meta)
    assert found.is_equal
    assert (tensor.compared_as, tensor.bit_identical) == (None, True)
    found, _ = compare_tensors(meta, torch.ones(2))
    assert not found.is_equal


def test_nested_files_and_renaming(compare_states):
    a = {"model": {"0": {"w": torch.ones(2)}, "1": {"w": torch.zeros(2)}}, "epoch": 3}
    b = {"0.w": torch.ones(2), "head.w": torch.zeros(2)}
    assert compare_states(a, b, rename={"model.1": "head", "model.": ""}).is_equal
    assert compare_states(a, b, rename=lambda name: name[-3:]).only_b == ["d.w"]
    with pytest.raises(fastsd.NamesError):
        compare_states(a, b, rename={"model.0": "x", "model.1": "x"})


@pytest.fixture
def small_blocks(monkeypatch):
    """Small pieces, and files opened anew after nearly each of them."""
    monkeypatch.setattr(diff_module, "_BLOCK_BYTES", 7 * 8)
    monkeypatch.setattr(diff_module, "_WINDOW_BYTES", 50)
    read = diff_module._Side.read

    def read_little(*args):
        part = read(*args)
        assert part.numel() <= 7
        return part

    monkeypatch.setattr(diff_module._Side, "read", read_little)


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "strided": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("layout_a", LAYOUTS)
def test_pieces_add_up(compare_states, layout_a, layout_b):
    x = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[::2, 1, ::3] += 0.5
    a = LAYOUTS[layout_a](x)
    b = LAYOUTS[layout_b](y)
    done = []
    found = compare_states(
        {"x": a, "tied": a, "view": a[1]},
        {"x": b, "tied": b, "view": b[1]},
        on_progress=lambda *sizes: done.append(sizes),
    )
    gap = (x.double() - y.double()).abs()
    whole, tied, view = found.tensors
    for tensor, expected in [(whole, gap), (tied, gap), (view, gap[1])]:
        assert tensor.differing == int((expected != 0).sum())
        assert tensor.max_abs == expected.max().item()
        assert tensor.mean_abs == pytest.approx(expected.mean().item())
    assert whole.bit_identical is False
    assert view.bit_identical is True
    total = 4 * (105 + 105 + 21)
    assert done[-1] == (total, total)
    assert len(done) > 15
    assert [sizes[0] for sizes in done] == sorted(sizes[0] for sizes in done)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtypes", [(torch.int8, torch.uint64), (torch.bits8, torch.bits8)])
def test_pieces_of_rare_dtypes_add_up(compare_tensors, dtypes):
    x, y = torch.arange(100, dtype=torch.uint8), torch.arange(100, dtype=torch.uint8)
    y[::9] += 1
    a, b = (
        t.view(dtype) if dtype == torch.bits8 else t.to(dtype)
        for t, dtype in zip((x, y), dtypes, strict=True)
    )
    _, tensor = compare_tensors(a, b)
    assert tensor.differing == 12


def test_expanded_tensors_are_read_once(compare_tensors):
    a = torch.ones(1).expand(1 << 40, 1)
    b = torch.full((1,), 3.0).expand(1 << 40, 1)
    _, tensor = compare_tensors(a, b)
    assert tensor.differing == tensor.elements == 1 << 40
    assert (tensor.max_abs, tensor.mean_abs) == (2.0, 2.0)


@pytest.mark.usefixtures("small_blocks")
def test_a_file_that_is_replaced_meanwhile_is_an_error(tmp_path):
    path = tmp_path / "a.fsd"
    fastsd.save({"x": torch.arange(100)}, path)
    fastsd.save({"x": torch.arange(100)}, tmp_path / "b.fsd")

    def replace(*_):
        fastsd.save({"x": torch.arange(101)}, path)

    with pytest.raises(fastsd.FormatError, match=r"a\.fsd: was replaced"):
        compare(path, tmp_path / "b.fsd", on_progress=replace)
