"""csrc/det_math.h in Triton: exp, log2 and sigmoid that give the same bits everywhere.

Operation by operation as there and in `mg_ops/reference.py`: launched with `enable_fp_fusion=False`, divided by
`tl.div_rn`.
"""

# Triton compiles these functions, and takes no annotations on their tensors.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit
def is_finite(x):
    """Neither infinite nor NaN."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def exp(x):
    """e**x. inf above 88.73, 0 below -104, NaN for NaN."""
    x = tl.where(x > 89.0, 89.0, x)
    x = tl.where(x < -104.5, -104.5, x)
    shifted = x * 1.442695041 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = r * 0.0013814540579915047 + 0.00836874544620514
    p = p * r + 0.04166838899254799
    p = p * r + 0.1666652113199234
    p = p * r + 0.4999999403953552
    p = (p * (r * r) + r) + 1.0
    exponent = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = exponent >> 1
    scale_1 = ((half + 127) << 23).to(tl.float32, bitcast=True)
    scale_2 = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    return (p * scale_1) * scale_2


@triton.jit
def log2(x):
    """log2(x) of finite x > 0; exactly 0 at 1."""
    subnormal = x < 1.175494351e-38
    bits = tl.where(subnormal, x * 8388608.0, x).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = f * -0.07634482532739639 + 0.12761959433555603
    p = p * f + -0.1316036432981491
    p = p * f + 0.14201720058918
    p = p * f + -0.1662333607673645
    p = p * f + 0.20001228153705597
    p = p * f + -0.250008225440979
    p = p * f + 0.3333333134651184
    f2 = f * f
    tail = p * (f2 * f) - f2 * 0.5
    log2_m = f * 1.442695041 + tail * 1.442695041
    return log2_m + tl.where(subnormal, exponent - 23, exponent).to(tl.float32)


@triton.jit
def sigmoid(x):
    """1 / (1 + e**-x) without overflow. NaN for NaN."""
    negative = x < 0
    e = exp(tl.where(negative, x, -x))
    return tl.div_rn(tl.where(negative, e, 1.0), 1.0 + e)
