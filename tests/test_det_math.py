"""exp, log2, sigmoid and their relatives: close to float64 over all of float32, and the same bits in C++ and PyTorch.

The C++ is that of csrc/det_math.h, power.h, box.h and assignment.h, through the bindings of tests/bindings.cpp.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from conftest import DEVICES

from mg_ops import reference
from mg_ops.rules.eager import arithmetic

try:
    import mg_ops_headers as headers
except ImportError as error:
    if os.environ.get("MG_OPS_TEST_NO_LIBRARY"):
        pytest.skip("MG_OPS_TEST_NO_LIBRARY is set: testing without the bindings", allow_module_level=True)
    raise ImportError(
        f"{error}; build the test bindings (cmake -DMG_OPS_TEST_BINDINGS=ON, target mg_ops_headers), "
        "or set MG_OPS_TEST_NO_LIBRARY=1 to test without them"
    ) from error

MAX_ERROR = 2e-7
MIN_NORMAL = float(np.finfo(np.float32).tiny)
MAX_FLOAT = float(np.finfo(np.float32).max)
SUBNORMAL_STEP = 2.0**-149
STRIDE = 257  # odd, so that every mantissa bit varies; 16.7 million of the 4.3 billion bit patterns
CHUNK = 1 << 21

FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "exp": (headers.det_exp, reference.exp),
    "log2": (headers.det_log2, reference.log2),
    "sigmoid": (headers.det_sigmoid, reference.sigmoid),
    "log1p": (headers.det_log1p, arithmetic.log1p),
    "exp10": (headers.det_exp10, arithmetic.exp10),
}


def to_floats(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def to_bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)


def around(*values: float, count: int = 20_000) -> np.ndarray:
    """Every float32 within `count` steps of the values."""
    centers = to_bits(np.array(values, dtype=np.float32)).astype(np.int64)
    return to_floats((centers[:, None] + np.arange(-count, count + 1)).ravel() & 0xFFFFFFFF)


def floats_of_every_kind() -> Iterator[np.ndarray]:
    """A regular sample of all bit patterns, then every float near the points where the functions change."""
    for start in range(0, 2**32, CHUNK * STRIDE):
        yield to_floats(np.arange(start, min(start + CHUNK * STRIDE, 2**32), STRIDE, dtype=np.uint64))
    # Both zeros, +-1, +-0.5, the overflow and underflow of exp, multiples of ln 2 / 2 where its argument reduction
    # turns, ...
    yield around(0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 1e-38, -1e-38)
    yield around(88.0, 88.72284, 89.0, -87.33655, -87.5, -88.0, -89.0, -103.97208, -104.5, 16.6, -16.6)
    yield around(*[(n + 0.5) * math.log(2) for n in range(-152, 129)], count=300)
    # ... and around sqrt(2) times powers of two, where that of log2 does.
    yield around(*[math.sqrt(0.5) * 2.0**n for n in range(-125, 128)], *[2.0**n for n in range(-126, 128)], count=300)
    yield np.array([np.inf, -np.inf, np.nan, MAX_FLOAT, -MAX_FLOAT, MIN_NORMAL, SUBNORMAL_STEP], dtype=np.float32)


def relative_error(value: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.abs(value.astype(np.float64) - exact) / np.abs(exact)


def assert_close_where_normal(
    value: np.ndarray, exact: np.ndarray, x: np.ndarray, max_error: float = MAX_ERROR
) -> None:
    """Within max_error where the exact value is a normal float32; within 1.5 steps where it is subnormal."""
    normal = (np.abs(exact) >= MIN_NORMAL) & (np.abs(exact) <= MAX_FLOAT)
    if normal.any():
        error = relative_error(value[normal], exact[normal])
        worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
        assert error[worst] <= max_error, (
            f"f({x[normal][worst]!r}) = {value[normal][worst]!r}, error {error[worst]:.3g}"
        )
    small = np.abs(exact) < MIN_NORMAL
    steps = np.abs(value[small].astype(np.float64) - exact[small]) / SUBNORMAL_STEP
    assert (steps <= 1.5).all(), f"f({x[small][np.argmax(steps)]!r}) is {steps.max()} subnormal steps off"
    assert not np.isnan(value).any()


def test_exp_is_close_to_float64() -> None:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for x in floats_of_every_kind():
            value, exact = headers.det_exp(x), np.exp(x.astype(np.float64))
            assert np.isnan(value[np.isnan(x)]).all()
            # Half a step past the largest float32 both answers are right.
            assert (value[exact > MAX_FLOAT * (1 + MAX_ERROR)] == np.inf).all()
            inside = exact <= MAX_FLOAT * (1 - MAX_ERROR)
            assert_close_where_normal(value[inside], exact[inside], x[inside])
            assert (value[inside] >= 0).all()


def test_exp_of_special_values() -> None:
    x = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 88.8, 1000, -104.5, -1000, MAX_FLOAT, -MAX_FLOAT], dtype=np.float32
    )
    np.testing.assert_array_equal(headers.det_exp(x), [1, 1, np.inf, 0, np.nan, np.inf, np.inf, 0, 0, np.inf, 0])


def test_log2_is_close_to_float64() -> None:
    for x in floats_of_every_kind():
        x = x[np.isfinite(x) & (x > 0)]
        value, exact = headers.det_log2(x), np.log2(x.astype(np.float64))
        assert_close_where_normal(value, exact, x)
        # Never above 0 for an IoU: an exponent of the amplified quality is compared as one that is not.
        assert (value[x <= 1] <= 0).all()
        assert (value[x < 1] < 0).all()


def test_log2_is_exact_at_powers_of_two() -> None:
    exponents = np.arange(-149, 128)
    value = headers.det_log2(np.ldexp(np.float32(1), exponents))
    np.testing.assert_array_equal(value, exponents.astype(np.float32))
    assert to_bits(headers.det_log2(np.array([1.0], dtype=np.float32)))[0] == 0  # +0, not -0


def test_log2_never_decreases_near_1() -> None:
    """Where two IoUs are both almost 1, the larger never gets the smaller logarithm."""
    x = np.sort(around(1.0, count=200_000))
    assert (np.diff(headers.det_log2(x)) >= 0).all()


def test_sigmoid_is_close_to_float64() -> None:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for x in floats_of_every_kind():
            value = headers.det_sigmoid(x)
            assert np.isnan(value[np.isnan(x)]).all()
            x, value = x[~np.isnan(x)], value[~np.isnan(x)]
            assert_close_where_normal(value, 1 / (1 + np.exp(-x.astype(np.float64))), x)
            assert ((value >= 0) & (value <= 1)).all()


def test_log1p_is_close_to_float64() -> None:
    """Of small x too, of which 1 + x keeps few bits; of others the rounding of that sum is part of the error."""
    for x in floats_of_every_kind():
        x = x[(x > -1) & (x <= 1)]
        assert_close_where_normal(headers.det_log1p(x), np.log1p(x.astype(np.float64)), x, 4e-7)
    x = np.array([0.0, -0.0, 1e-45], dtype=np.float32)
    np.testing.assert_array_equal(headers.det_log1p(x), x)


def test_exp10_is_close_to_float64() -> None:
    for x in floats_of_every_kind():
        x = x[(x > -37) & (x < 38.5)]
        assert_close_where_normal(headers.det_exp10(x), 10 ** x.astype(np.float64), x)
    x = np.array([0.0, 39.0, np.inf, -46.0, -np.inf, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(headers.det_exp10(x), [1, np.inf, np.inf, 0, 0, np.nan])


def test_sigmoid_of_special_values() -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 100, -200, MAX_FLOAT, -MAX_FLOAT], dtype=np.float32)
    np.testing.assert_array_equal(headers.det_sigmoid(x), [0.5, 0.5, 1, 0, np.nan, 1, 0, 1, 0])
    np.testing.assert_array_equal(headers.class_probability(x, False), [0.5, 0.5, 1, 0, 0, 1, 0, 1, 0])


def test_probabilities_are_contained() -> None:
    x = np.array([0.0, -0.0, 1.0, 0.25, np.inf, -np.inf, np.nan, 1 + 2**-23, -1e-45, 1e-45], dtype=np.float32)
    expected = np.array([0, 0, 1, 0.25, 1, 0, 0, 1, 0, 1e-45], dtype=np.float32)
    np.testing.assert_array_equal(headers.class_probability(x, True), expected)
    for x in floats_of_every_kind():
        contained = headers.class_probability(x, True)
        np.testing.assert_array_equal(contained, np.nan_to_num(np.clip(x, 0, 1), nan=0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_has_the_same_bits(name: str, device: str) -> None:
    in_headers, in_reference = FUNCTIONS[name]
    for x in floats_of_every_kind():
        if name == "log2":
            x = x[np.isfinite(x) & (x > 0)]
        elif name == "log1p":
            x = x[(x > -1) & (x <= 1)]
        expected = in_headers(x)
        value = in_reference(torch.from_numpy(x).to(device)).cpu().numpy()
        assert (np.isnan(expected) == np.isnan(value)).all()
        different = (to_bits(expected) != to_bits(value)) & ~np.isnan(expected)
        if different.any():
            i = int(np.argmax(different))
            raise AssertionError(
                f"{name}({x[i]!r}): {expected[i]!r} in C++, {value[i]!r} in PyTorch; {different.sum()} differ"
            )


# ---------------------------------------------------------------------------------------------------------------------
# What is built of them


def boxes_of_every_kind(count: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    corner = random.random((count, 2)) * 10
    boxes = np.concatenate([corner, corner + random.exponential(3, (count, 2))], axis=1)
    integer = random.integers(0, 6, (count, 4))
    bits = to_floats(random.integers(0, 2**32, (count, 4), dtype=np.uint64))
    scale = 10.0 ** random.uniform(-30, 30, (count, 1))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.concatenate([boxes, integer, boxes * scale, bits]).astype(np.float32)


def test_box_iou_has_the_same_bits() -> None:
    boxes_1, boxes_2 = boxes_of_every_kind(400, 0), boxes_of_every_kind(300, 1)
    expected = headers.box_iou(boxes_1, boxes_2)
    value = reference.box_iou(torch.from_numpy(boxes_1), torch.from_numpy(boxes_2)).numpy()
    np.testing.assert_array_equal(to_bits(value), to_bits(expected))
    assert (expected >= 0).all() and (expected <= 1).all()
    assert ((expected > 0) & (expected < 1)).mean() > 0.01


def test_iou_never_exceeds_1() -> None:
    """So that log2 of it never exceeds 0, whatever the rounding: nested, equal and nearly equal boxes."""
    random = np.random.default_rng(2)
    boxes = random.random((1500, 4)).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    nearly = to_floats(to_bits(boxes[:300]).astype(np.int64) + random.integers(-2, 3, (300, 4)))
    assert headers.box_iou(boxes, np.concatenate([boxes[:300], nearly])).max() == 1


def test_is_object_agrees() -> None:
    boxes = boxes_of_every_kind(5000, 3)
    np.testing.assert_array_equal(headers.is_object(boxes), reference.is_object(torch.from_numpy(boxes)).numpy())


@pytest.mark.parametrize("weights", [(10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 3.0, -1.7)])
@pytest.mark.parametrize("clip", [math.log(1000 / 16), math.inf, 0.0])
def test_decoded_boxes_have_the_same_bits(weights: tuple[float, float, float, float], clip: float) -> None:
    anchors = boxes_of_every_kind(5000, 4)
    deltas = np.concatenate([np.random.default_rng(5).normal(0, 3, (10000, 4)), boxes_of_every_kind(2500, 6)])
    deltas = deltas.astype(np.float32)
    expected = headers.decode_box(anchors, deltas, *weights, clip)
    value = reference.decode(
        torch.from_numpy(anchors), torch.from_numpy(deltas), weights, float(np.float32(clip))
    ).numpy()
    assert (np.isnan(expected) == np.isnan(value)).all()
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(to_bits(value)[number], to_bits(expected)[number])


def test_orders_compare_as_qualities() -> None:
    """Integer orders sort as the floats they stand for; 0 is below all of them."""
    q = np.sort(
        np.concatenate([np.random.default_rng(7).random(10000), 10.0 ** np.arange(-44, 0), [1.0]]).astype(np.float32)
    )
    order = headers.iou_order(q).astype(np.int64)
    assert ((np.diff(order) > 0) == (np.diff(q) > 0)).all() and (np.diff(order) >= 0).all()
    assert order[0] > 0 and order[-1] == headers.FORCED_IOU_ORDER

    exponent = np.sort(-np.concatenate([q, q * 149]))
    order = headers.exponent_order(exponent).astype(np.int64)
    assert ((np.diff(order) > 0) == (np.diff(exponent) > 0)).all() and (np.diff(order) >= 0).all()
    assert order[0] > 0
    both_zeros = headers.exponent_order(np.array([0.0, -0.0], dtype=np.float32))
    assert both_zeros.tolist() == [headers.FORCED_EXPONENT_ORDER] * 2


def test_claim_keys_put_the_lower_index_first() -> None:
    # (order, index), from the weakest claim to the strongest
    claims = [(0, 2**31), (1, 9), (1, 3), (1, 0), (2, 2**31 - 1), (2, 8), (2**32 - 1, 5), (2**32 - 1, 0)]
    orders, indices = (np.array(column, dtype=np.uint32) for column in zip(*claims, strict=True))
    keys = headers.claim_key(orders, indices)
    assert (keys[1:] > keys[:-1]).all()
    np.testing.assert_array_equal(headers.key_order(keys), orders)
    np.testing.assert_array_equal(headers.key_index(keys), indices)


@pytest.mark.parametrize("sigma", [1.0000001192092896, 1.5, 2.0, 1e3, 3e38])
def test_amplified_exponent_is_the_logarithm_of_the_power(sigma: float) -> None:
    random = np.random.default_rng(8)
    q = random.random(100_000).astype(np.float32)
    p = np.concatenate([random.random(99_998), [0.0, 1.0]]).astype(np.float32)
    exponent = headers.amplified_exponent(headers.det_log2(q), p, sigma)
    assert np.isfinite(exponent).all() and (exponent <= 0).all()
    # sigma - p is rounded to sigma's precision, and that is what the definition says.
    exact_sigma = np.float64(np.float32(sigma))
    rounded = (np.float32(sigma) - p).astype(np.float64)
    np.testing.assert_allclose(exponent, rounded / exact_sigma * np.log2(q.astype(np.float64)), rtol=4e-7)


def test_sentinels_agree() -> None:
    assert (headers.BACKGROUND, headers.IGNORED) == (reference.BACKGROUND, reference.IGNORED)
