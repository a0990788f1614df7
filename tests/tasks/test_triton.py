"""What torch's compiler has inlined into a product with one row is counted in the text of its kernel."""

from __future__ import annotations

import pytest

from tasks.optimizations._triton import repeated_operations

# as torch 2.13 writes them for the product that follows SiLU, shortened by what holds no value
INLINED = """\
# kernel path: none
triton_red_fused_2 = async_compile.triton('triton_red_fused_2', '''
@triton.jit
def triton_red_fused_2(in_ptr0, in_ptr1, in_ptr2, out_ptr1, xnumel, r0_numel, XBLOCK : tl.constexpr):
    x0 = xindex
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        r0_1 = r0_index
        tmp0 = tl.load(in_ptr0 + (r0_1), r0_mask, eviction_policy='evict_last', other=0.0)
        tmp9 = tl.load(in_ptr1 + (r0_1), r0_mask, eviction_policy='evict_last', other=0.0)
        tmp13 = tl.load(in_ptr2 + (r0_1 + 14336*x0), r0_mask, eviction_policy='evict_first').to(tl.float32)
        tmp1 = tmp0.to(tl.float32)
        tmp3 = -tmp1
        tmp4 = libdevice.exp(tmp3)
        tmp5 = tl.full([1, 1], 1.0, tl.float32)
        tmp6 = tmp4 + tmp5
        tmp7 = (tmp1 / tmp6)
        tmp10 = tmp9.to(tl.float32)
        tmp11 = tmp7 * tmp10
        tmp14 = tmp13.to(tl.float32)
        tmp15 = tmp11 * tmp14
        tmp16 = tl.broadcast_to(tmp15, [XBLOCK, R0_BLOCK])
        tmp18 = _tmp17 + tmp16
        _tmp17 = tl.where(r0_mask, tmp18, _tmp17)
    tmp17 = tl.sum(_tmp17, 1)[:, None]
    tl.store(out_ptr1 + (x0), tmp17, None)
''', device_str='cuda')
"""
BESIDE = """\
@triton.jit
def triton_red_fused_2(in_ptr0, in_ptr1, out_ptr1, xnumel, r0_numel, XBLOCK : tl.constexpr):
    x0 = xindex
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        r0_1 = r0_index
        tmp0 = tl.load(in_ptr0 + (r0_1), r0_mask, eviction_policy='evict_last', other=0.0).to(tl.float32)
        tmp2 = tl.load(in_ptr1 + (r0_1 + 14336*x0), r0_mask, eviction_policy='evict_first').to(tl.float32)
        tmp1 = tmp0.to(tl.float32)
        tmp3 = tmp2.to(tl.float32)
        tmp4 = tmp1 * tmp3
        tmp6 = _tmp5 + tmp4
        _tmp5 = tl.where(r0_mask & xmask, tmp6, _tmp5)
    tmp5 = tl.sum(_tmp5, 1)[:, None]
    tmp7 = libdevice.exp(tmp5)
    tl.store(out_ptr1 + (x0), tmp7, None)
"""
# scores plus mask: reads a matrix and a vector, and multiplies by a number, which is no product of the two
SOFTMAX = """\
def triton_per_fused_6(in_ptr0, in_ptr1, out_ptr0, xnumel, r0_numel, XBLOCK : tl.constexpr):
    tmp0 = tl.load(in_ptr0 + (r0_1 + 640*x0), r0_mask & xmask, other=0.0)
    tmp1 = tl.full([1, 1], 0.0884, tl.float32)
    tmp2 = tmp0 * tmp1
    tmp4 = tl.load(in_ptr1 + (r0_1), r0_mask, other=0.0).to(tl.float32)
    tmp5 = tmp2 + tmp4
    tmp9 = tl.sum(tmp5, 1)[:, None]
"""
# rows scaled by a vector, of which the squares are added up
NORM = """\
def triton_per_fused_7(in_ptr0, in_ptr1, out_ptr0, xnumel, r0_numel, XBLOCK : tl.constexpr):
    tmp0 = tl.load(in_ptr0 + (r0_1 + 4096*x0), r0_mask & xmask, other=0.0)
    tmp1 = tl.load(in_ptr1 + (r0_1), r0_mask, other=0.0)
    tmp2 = tmp0 * tmp1
    tmp3 = tmp2 * tmp2
    tmp4 = tl.sum(tmp3, 1)[:, None]
"""
# one sum cut into two kernels: x1 is the part, x0 the row
SPLIT = """\
def triton_red_fused_8(in_ptr0, in_ptr1, out_ptr0, xnumel, r0_numel, XBLOCK : tl.constexpr):
    x0 = (xindex % 128)
    x1 = xindex // 128
    tmp0 = tl.load(in_ptr0 + (r0_2 + 2048*x1), r0_mask)
    tmp1 = -tmp0
    tmp2 = libdevice.exp(tmp1)
    tmp3 = tl.load(in_ptr1 + (r0_2 + 2048*x1 + 4096*x0), r0_mask)
    tmp4 = tmp2 * tmp3
    tmp5 = tl.sum(tmp4, 1)[:, None]
"""
# the second product makes its vector behind the first one's sum; a row's own index is a value, too
TWO = """\
def triton_per_fused_9(in_ptr0, in_ptr1, in_ptr2, in_ptr3, xnumel, r0_numel, XBLOCK : tl.constexpr):
    tmp12 = x0
    tmp13 = tmp12 < 5
    tmp0 = tl.load(in_ptr0 + (r0_1), None)
    tmp1 = tl.load(in_ptr1 + (r0_1 + 256*x0), None)
    tmp2 = tmp0 * tmp1
    tmp3 = tl.sum(tmp2, 1)[:, None]
    tmp4 = tl.load(in_ptr2 + (r0_1), None)
    tmp5 = -tmp4
    tmp6 = libdevice.exp(tmp5)
    tmp9 = tl.load(in_ptr3 + (r0_1 + 256*x0), None)
    tmp10 = tmp6 * tmp9
    tmp11 = tl.sum(tmp10, 1)[:, None]
"""
POINTWISE = """\
def triton_poi_fused_3(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    tmp0 = tl.load(in_ptr0 + (x0), xmask)
    tmp1 = tmp0 * tmp0
    tl.store(out_ptr0 + (x0), tmp1, xmask)
"""


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([INLINED], [9]),
        ([BESIDE], [2]),
        ([INLINED, BESIDE, SOFTMAX, POINTWISE], [9, 2]),
        ([INLINED, INLINED], [9]),
        ([SPLIT], [3]),
        ([TWO], [4]),
        ([SOFTMAX], []),
        ([NORM], []),
        ([POINTWISE], []),
        (["def call(args):\n    return args\n"], []),
        ([], []),
    ],
)
def test_operations_that_a_product_repeats(texts: list[str], expected: list[int]) -> None:
    assert sorted(repeated_operations(texts), reverse=True) == expected
