"""GroupNorm and SiLU as one pass over channels-last activations, forward and back, in Triton: for training on a GPU.

PyTorch's GroupNorm there wants channels first, and autocast has it in fp32: two casts, two transpositions and five passes. This one
reads and writes what the convolutions have. Sums are in fp32.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.nn.functional import silu


@triton.jit  # type: ignore[untyped-decorator]
def norm_forward(  # type: ignore[no-untyped-def]
    x, y, w, b, mean, rstd, eps, C, HW, G, GS, HB: tl.constexpr, GB: tl.constexpr, SB: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """Of one picture, GB groups of GS channels over HW cells; blocks are HB x GB x SB, powers of two."""
    n = tl.program_id(0)
    g = tl.program_id(1) * GB + tl.arange(0, GB)
    j, q = tl.arange(0, SB), tl.arange(0, HB)
    c = g[:, None] * GS + j[None, :]
    keep_c = (j[None, :] < GS) & (g[:, None] < G)
    keep = keep_c[None, :, :] & (q[:, None, None] < HW)
    at = n * HW * C + q[:, None, None] * C + c[None, :, :]
    v = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    m = tl.sum(tl.sum(v, 2), 0) / (GS * HW)
    d = tl.where(keep, v - m[None, :, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(tl.sum(d * d, 2), 0) / (GS * HW) + eps)
    wc = tl.load(w + c, mask=keep_c, other=0.0).to(tl.float32)
    bc = tl.load(b + c, mask=keep_c, other=0.0).to(tl.float32)
    u = d * r[None, :, None] * wc[None, :, :] + bc[None, :, :]
    if SILU:
        u = u * tl.sigmoid(u)
    tl.store(y + at, u.to(y.dtype.element_ty), mask=keep)
    tl.store(mean + n * G + g, m, mask=g < G)
    tl.store(rstd + n * G + g, r, mask=g < G)


@triton.jit  # type: ignore[untyped-decorator]
def norm_backward(  # type: ignore[no-untyped-def]
    x, dy, dx, w, b, mean, rstd, dw, db, C, HW, G, GS, HB: tl.constexpr, GB: tl.constexpr, SB: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """Gradients of x, and of w and b for each picture by itself."""
    n = tl.program_id(0)
    g = tl.program_id(1) * GB + tl.arange(0, GB)
    j, q = tl.arange(0, SB), tl.arange(0, HB)
    c = g[:, None] * GS + j[None, :]
    keep_c = (j[None, :] < GS) & (g[:, None] < G)
    keep = keep_c[None, :, :] & (q[:, None, None] < HW)
    at = n * HW * C + q[:, None, None] * C + c[None, :, :]
    m = tl.load(mean + n * G + g, mask=g < G, other=0.0)
    r = tl.load(rstd + n * G + g, mask=g < G, other=0.0)
    wc = tl.load(w + c, mask=keep_c, other=0.0).to(tl.float32)
    bc = tl.load(b + c, mask=keep_c, other=0.0).to(tl.float32)
    v = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    h = tl.where(keep, (v - m[None, :, None]) * r[None, :, None], 0.0)
    du = tl.load(dy + at, mask=keep, other=0.0).to(tl.float32)
    if SILU:
        u = h * wc[None, :, :] + bc[None, :, :]
        s = tl.sigmoid(u)
        du = du * s * (1.0 + u * (1.0 - s))
    tl.store(dw + n * C + c, tl.sum(du * h, 0), mask=keep_c)
    tl.store(db + n * C + c, tl.sum(du, 0), mask=keep_c)
    dh = du * wc[None, :, :]
    m1 = tl.sum(tl.sum(dh, 2), 0) / (GS * HW)
    m2 = tl.sum(tl.sum(dh * h, 2), 0) / (GS * HW)
    d = r[None, :, None] * (dh - m1[None, :, None] - h * m2[None, :, None])
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=keep)


class NormSiLU(torch.autograd.Function):
    """SiLU of the group norm, or that alone, of x (n cells c), contiguous."""

    @staticmethod
    def launch(n: int, cells: int, channels: int, groups: int) -> tuple[tuple[int, int], dict[str, int]]:
        hb, sb = triton.next_power_of_2(cells), triton.next_power_of_2(channels // groups)
        gb = min(triton.next_power_of_2(groups), max(1, (8192 if hb >= 256 else 4096) // (hb * sb)))
        return (n, -(-groups // gb)), {"HB": hb, "GB": gb, "SB": sb, "num_warps": 16 if hb * gb * sb >= 4096 else 8}

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float, with_silu: bool) -> Tensor:
        n, cells, c = x.shape
        y = torch.empty_like(x)
        mean, rstd = torch.empty(2, n, groups, device=x.device, dtype=torch.float32)
        grid, meta = NormSiLU.launch(n, cells, c, groups)
        norm_forward[grid](x, y, w, b, mean, rstd, eps, c, cells, groups, c // groups, SILU=with_silu, **meta)
        ctx.save_for_backward(x, w, b, mean, rstd)
        ctx.groups, ctx.with_silu = groups, with_silu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, mean, rstd = ctx.saved_tensors
        n, cells, c = x.shape
        dy, dx = dy.contiguous(), torch.empty_like(x)
        dw, db = torch.empty(2, n, c, device=x.device, dtype=torch.float32)
        grid, meta = NormSiLU.launch(n, cells, c, ctx.groups)
        norm_backward[grid](
            x, dy, dx, w, b, mean, rstd, dw, db, c, cells, ctx.groups, c // ctx.groups, SILU=ctx.with_silu, **meta
        )
        return dx, dw.sum(0), db.sum(0), None, None, None


class FusedNorm(torch.nn.GroupNorm):
    """GroupNorm, and SiLU after it where `silu`; of maps (n c h w) or of sequences (n c cells)."""

    silu = False

    def forward(self, x: Tensor) -> Tensor:
        cells = x.flatten(2).transpose(1, 2).contiguous()  # no copy of a channels-last map
        fused: Callable[..., Tensor] = NormSiLU.apply
        y = fused(cells, self.weight, self.bias, self.num_groups, self.eps, self.silu).transpose(1, 2)
        return y.reshape(x.shape)


def fuse(net: UNet2DModel) -> None:
    """Give a network the fused norms, in place; its weights and their names stay."""
    for module in net.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.__class__ = FusedNorm
    for module in net.modules():
        if isinstance(module, ResnetBlock2D):
            module.norm1.silu = module.norm2.silu = True
            module.forward = types.MethodType(block, module)
    net.conv_norm_out.silu = True
    net.conv_act = torch.nn.Identity()


def block(self: ResnetBlock2D, x: Tensor, temb: Tensor) -> Tensor:
    """ResnetBlock2D.forward, with SiLU within the norms: no resampling, no dropout, time added between the convolutions."""
    hidden = self.conv1(self.norm1(x)) + self.time_emb_proj(silu(temb))[:, :, None, None]
    hidden = self.conv2(self.norm2(hidden))
    shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
    together: Tensor = shortcut + hidden
    return together
