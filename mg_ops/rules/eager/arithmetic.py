"""Functions that give the same bits on every device, as `mg_ops.reference.exp` does; the same as in csrc/power.h."""

from __future__ import annotations

import torch
from torch import Tensor

from mg_ops.reference import exp, exp_reduced, log2, log2_reduced


def square_root(x: Tensor) -> Tensor:
    """The square root in float32, correctly rounded, which torch's own is not everywhere."""
    return x.double().sqrt().float()


SUM_LANES = 16
"""How many sums a sum is made of; csrc/ranked.h."""


def sum_rows(values: Tensor) -> Tensor:
    """(M, C) -> (M,) sums in one order: value c goes to sum c modulo 16, then halves of the sums are added."""
    sums = values.new_zeros(len(values), SUM_LANES)
    for part in values.split(SUM_LANES, dim=1):
        sums[:, : part.shape[1]] += part
    while sums.shape[1] > 1:
        lower, upper = sums.chunk(2, dim=1)
        sums = lower + upper
    return sums[:, 0]


def power(x: Tensor, exponent: float) -> Tensor:
    """x**exponent in float32 of x and an exponent >= 0: a product where twice the exponent is whole and up to 16."""
    halves = 2 * exponent
    if halves == int(halves) and halves <= 16:
        whole, square, result = int(halves) // 2, x, torch.ones_like(x)
        while whole > 0:
            if whole % 2 == 1:
                result = result * square
            whole, square = whole // 2, square * square
        return result * square_root(x) if int(halves) % 2 == 1 else result
    positive = x > 0
    result = exp((log2(torch.where(positive, x, 1.0)) * 0.69314718) * exponent)
    return torch.where(positive, result.clamp(max=1.0), 0.0)


def arctangent(x: Tensor) -> Tensor:
    """atan(x) in float32 of x >= 0, infinity included; the polynomial of Cephes."""
    steep, middle = x > 2.4142135623730950, x > 0.41421356237309503
    base = torch.where(steep, 1.5707963267948966, torch.where(middle, 0.78539816339744831, torch.zeros_like(x)))
    x = torch.where(steep, -1.0 / x, torch.where(middle, (x - 1.0) / (x + 1.0), x))
    z = x * x
    p = torch.full_like(z, 0.0805374449538)
    for coefficient in (-0.138776856032, 0.199777106478, -0.333329491539):
        p = p * z + coefficient
    return ((p * z) * x + x) + base


def log1p(x: Tensor) -> Tensor:
    """ln(1 + x) in float32 of x from -1 to 1, exact to the last bits near 0; meaningless at -1."""
    bits = (1.0 + x).view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = torch.where(exponent == 0, x, (bits - (exponent << 23)).view(torch.float32) - 1.0)
    return log2_reduced(f, exponent) * 0.69314718


def log(x: Tensor) -> Tensor:
    """ln(x) in float32 of finite x > 0."""
    return log2(x) * 0.69314718


def exp10(x: Tensor) -> Tensor:
    """10**x in float32. inf above 38.54, 0 below -45.4, NaN for NaN."""
    x = torch.where(x > 38.65, 38.65, x)
    x = torch.where(x < -45.5, -45.5, x)
    shifted = x * 3.321928095 + 12582912.0
    n = shifted - 12582912.0
    return exp_reduced(((x - n * 0.30078125) - n * 2.48745664e-4) * 2.302585093, shifted)
