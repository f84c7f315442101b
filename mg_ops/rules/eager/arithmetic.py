"""Functions that give the same bits on every device, as `mg_ops.reference.exp` does; the same as in csrc/power.h."""

from __future__ import annotations

import torch
from torch import Tensor

from mg_ops.reference import exp, log2


def square_root(x: Tensor) -> Tensor:
    """The square root in float32, correctly rounded, which torch's own is not everywhere."""
    return x.double().sqrt().float()


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
