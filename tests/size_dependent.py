"""Decoders whose result depends on the size of the picture by more than its shape, as users write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: Latents at which the modules are traced, and the picture's size for them.
TRACED = (8, 12)


class Decoding(nn.Module):
    """A convolutional autoencoder of half the size in latents, in whose decoder something depends on the size."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 4, 4, 2, 1)
        self.into, self.up = nn.Conv2d(2, 4, 3, 1, 1), nn.ConvTranspose2d(4, 1, 4, 2, 1)
        self.position = nn.Parameter(torch.linspace(-1, 1, 4 * TRACED[0] * TRACED[1]).reshape(1, 4, *TRACED))
        self.function = function

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.down(x).chunk(2, dim=1)

    def decode(self, z: Tensor) -> Tensor:
        return self.up(self.function(self, self.into(z)))


def branch(module: nn.Module, h: Tensor) -> Tensor:
    return 2 * h if h.shape[2] * h.shape[3] > 256 else h


def split(module: nn.Module, h: Tensor) -> Tensor:
    return torch.cat(torch.split(h, 4, dim=3)[::-1], 3)


def kernel(module: nn.Module, h: Tensor) -> Tensor:
    side = 2 * (min(h.shape[3], 16) // 2) - 1
    return nn.functional.avg_pool2d(h, side, 1, side // 2)


def embedded(module: nn.Module, h: Tensor) -> Tensor:
    return h + module.position


def interpolated(module: nn.Module, h: Tensor) -> Tensor:
    return h + nn.functional.interpolate(module.position, size=h.shape[-2:], mode="bilinear")


def halved(module: nn.Module, h: Tensor) -> Tensor:
    return h + nn.functional.interpolate(
        nn.functional.interpolate(h, size=(int(h.shape[2] / 2), int(h.shape[3] / 2))), size=h.shape[-2:]
    )


def reshaped(module: nn.Module, h: Tensor) -> Tensor:
    return h.flatten(2).reshape(-1, 4, TRACED[0] * TRACED[1]).softmax(1).reshape(h.shape)


def pooled(module: nn.Module, h: Tensor) -> Tensor:
    return h + nn.functional.interpolate(nn.functional.adaptive_avg_pool2d(h, 4), size=h.shape[-2:])


def windows(module: nn.Module, h: Tensor) -> Tensor:
    height, width = h.shape[-2:]
    padded = nn.functional.pad(h, (0, -width % 8, 0, -height % 8))
    b, c, high, wide = padded.shape
    parts = padded.reshape(b, c, high // 8, 8, wide // 8, 8).permute(0, 2, 4, 3, 5, 1).reshape(-1, 1, 64, c)
    parts = nn.functional.scaled_dot_product_attention(parts, parts, parts)
    joined = parts.reshape(b, high // 8, wide // 8, 8, 8, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, high, wide)
    return joined[:, :, :height, :width]


def length(module: nn.Module, h: Tensor) -> Tensor:
    return h.reshape(len(h), 4, -1).softmax(1).reshape(h.shape)


def rows(module: nn.Module, h: Tensor) -> Tensor:
    return torch.stack([h[:, :, i] / (i + 1) for i in range(h.shape[2])], 2)


def centred(module: nn.Module, h: Tensor) -> Tensor:
    return h - h.mean((2, 3), keepdim=True) + torch.arange(h.shape[3], dtype=h.dtype) / h.shape[3]


#: By name: the function, and a pattern of its refusal, or None if it is exported and right at every size.
KINDS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str | None]] = {
    "a branch": (
        branch,
        r"the graph assumes that \(height/2\)\*\(width/2\) <= 256, which is false at .*height/2 4",
    ),
    "a split into parts of a constant": (split, r"\(width/2\) \+ 3\)//4\) == 3, which is false at width/2 4"),
    "a kernel of a size": (kernel, r"assumes that \(Min\(16, \(width/2\)\)//2\) == 6, which is false at"),
    "positions of one size": (embedded, r"decode failed .*It was tried at another size .* because multiple_of is 8"),
    "positions interpolated": (interpolated, None),
    "int of a half": (halved, r"assumes that .*\(height/2\), 2\)\) == 4, .*instead of int\(w / 2\)"),
    "reshape to a constant": (reshaped, r"decode failed .*It was tried at another size .* a number in reshape is"),
    "pooling to a grid": (pooled, r"assumes that \(\(height/2\)//4\) == 2, which is false at"),
    "windows": (windows, None),
    "len": (length, r"batch became the constant 3\. .*write z\.shape\[0\] instead of len\(z\)"),
    "a loop over rows": (rows, r"height/2 became the constant 8\. .*operators over the whole axis instead of a l"),
    "sums and counts": (centred, None),
}
