"""The 8-bit picture whose encoding is a wanted latent z*, rather than the rounded and clipped decoding of z*.

    x = argmin |W (E(x) - z*)|^2 + mu |x - D(z*)|^2   over x in L^n on the free pixels, x given on the others

L are the 256 values that a byte stands for, and the first norm runs over the latent cells that the receiver will read. W weighs a
channel by what the decoder makes of it, for errors grow in the loop about as much: on faces128 the squared error by 40 for the mean
of a block and by 0.02 to 0.2 for its detail. Decoders leave [-1, 1], and clipping them costs more than rounding. The receiver's E
reads far fewer numbers than the picture has, so the rest of the picture can make up for both.

Block DCT. Each block is a problem of its own, with W E(x) = B x + b. Over the box [min L, max L]^n its dual is unconstrained:

    x(l) = clip(D(z*) + B^T l),      B x(l) + b - W z* + mu l = 0,

and Newton's method (Jacobian B diag(x(l) is not clipped) B^T + mu) ends in a few steps. Rounding then moves one pixel of each block
at a time by one level, the one that lowers |W (E(x) - z*)|^2 most, until none does; then two at once, which is finer.

Learned autoencoders. The same objective over the same box, descended by projected gradients whose step lengths alternate between
Barzilai and Borwein's two (IMA J. Numer. Anal. 8, 1988; Dai and Fletcher, Numer. Math. 100, 2005). Rounding again moves pixels by a
level s, where by half the gradient g and a mean curvature c that promises s (2 g + c s) < 0: the best pixel of each neighbourhood,
all at once, but of these only a random share, which halves whenever the picture as a whole got no better.

JPEG on the way, J. Then the error counts after it: z <- z + (z* - E(J(x(z)))) / 2 from z = z*, x(z) the rounded D(z), moves
coefficients that J rounds the wrong way to their other neighbour; each picture keeps its best x.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import max_pool2d, pixel_shuffle, pixel_unshuffle

from keyanon.batching import in_chunks
from keyanon.channel.pixels import jpeg, to_bytes, to_floats
from keyanon.diffusion.block_dct import BLOCK, BlockDCT
from keyanon.diffusion.solvers import expand
from keyanon.errors import BadSetting
from keyanon.settings import Quality, checked, number, whole
from keyanon.types import Bytes, Image, Latent, Mask, Scores

Values = Float[Tensor, "..."]  # of pictures, or of single levels
Levels = Float[Tensor, "256"]  # what each byte stands for, ascending
Misfit = Callable[[Image], tuple[Scores, Image]]  # |W (E(x) - z*)|^2 of each picture, half its gradient
NEWTON_STEPS = 30
NEWTON_TOLERANCE = 1e-9
STEP_LENGTHS = 10  # 1, 1/2, 1/4, ...
ROUNDING_MOVES = 400  # pixels of a block that are moved by a level
PAIRED_MOVES = 30  # of two pixels at once
PAIRED = 64  # pixels of a block that may go in pairs: the ones whose own moves harm least
NO_CHANGE = -1e-14
JPEG_STEPS = 12
NEIGHBOURHOOD = 5  # pixels a side
TINY = 1e-30
PROBE = 16  # cells a side of the latent that channel_weights probes


@runtime_checkable
class Coder(Protocol):
    """What is asked of the receiver's model: its autoencoder, E and D, and how many pictures go through at once."""

    @property
    def autoencoder(self) -> Any: ...

    @property
    def chunk(self) -> int: ...

    @property
    def fits(self) -> dict[str, int]: ...

    def encode(self, images: Image) -> Latent: ...

    def decode(self, latents: Latent, quantize: bool = True) -> Image: ...


@checked
@dataclass(frozen=True)
class ToneCurve:
    """What bytes stand for inside the face: more than [-1, 1], so that little of D(z*) is clipped.

    The curve is the usual one between -knee and knee, and goes on from there in a straight line to `reach` at white and to
    -reach at black. The default is the usual one throughout. ToneCurve(0.95, 1.35) spends six levels at either end.
    """

    knee: float = 1.0
    reach: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.knee < 1 <= self.reach or self.knee == self.reach == 1):
            raise BadSetting(f"tone curve: knee={self.knee}, reach={self.reach}; it needs 0 < knee < 1 <= reach")

    @property
    def slope(self) -> float:
        """Of the curve beyond the knee."""
        return (self.reach - self.knee) / (1 - self.knee) if self.knee < 1 else 1.0

    def expand(self, images: Values) -> Values:
        """What published values stand for."""
        beyond = (images.abs() - self.knee).clamp(min=0)
        return images + images.sign() * beyond * (self.slope - 1)

    def compress(self, images: Values) -> Values:
        """The inverse of `expand`: values within `reach` come to lie in [-1, 1]."""
        beyond = (images.abs() - self.knee).clamp(min=0)
        return images + images.sign() * beyond * (1 / self.slope - 1)

    def levels(self) -> Levels:
        return self.expand(to_floats(torch.arange(256, dtype=torch.uint8)).double())

    def read(self, published: Bytes, free: Mask) -> Image:
        """The floats of published bytes: by the curve on the free pixels, the usual ones elsewhere."""
        usual = to_floats(published)
        return torch.where(free, self.expand(usual), usual)


@checked
@dataclass(frozen=True)
class Refinement:
    """Finds the published picture for a latent.

    Args:
        tone: what the receiver takes the bytes of free pixels for.
        pull: mu above; more of it stays nearer to D(z*) where no picture has the wanted encoding, or only an ugly one.
        descent, rounding: passes forward and back through a learned encoder for each; the block DCT needs none.
        jpeg: quality of a JPEG that the published picture will go through; None for a lossless file.
    """

    tone: ToneCurve = ToneCurve()
    pull: Annotated[float, number(0, 1000)] = 0.01
    descent: Annotated[int, whole(0, 10**6)] = 40
    rounding: Annotated[int, whole(0, 10**6)] = 30
    jpeg: Quality | None = None
    senders: ClassVar = ("pull", "descent", "rounding", "jpeg")  # the receiver reads bytes by the tone curve alone

    def __call__(self, backbone: Coder, target: Latent, start: Image, added: Image, free: Mask, cells: Mask) -> Bytes:
        """Bytes whose encoding, once the receiver has read them by `tone.read` and taken off `added`, is near `target` on `cells`.

        Args:
            backbone: the receiver's.
            target: z*.
            start: D(z*) + c unclipped on the free pixels, the given picture's floats on the others.
            added: c (keyanon/methods/seams.py), zeros for none.
            free: (b, 1, h, w) pixels that may change; the others are published as they are.
            cells: (b, 1, u, v) what counts of the latent.
        """
        chosen = self._lossless(backbone, target, start, added, free, cells)
        if (quality := self.jpeg) is None:
            return chosen
        weights = channel_weights(backbone, target)[:, None, None]

        def error_after_jpeg(published: Bytes) -> Latent:
            read = self.tone.read(through_jpeg(published, quality), free)
            return (target - backbone.encode(read - added * free)) * cells

        z, error = target, error_after_jpeg(chosen)
        lowest = (error * weights).square().flatten(1).sum(1)
        for _ in range(JPEG_STEPS):
            z = z + error / 2
            floats = torch.where(free, backbone.decode(z, quantize=False) + added, start)
            trial = to_bytes(torch.where(free, self.tone.compress(floats), start))
            error = error_after_jpeg(trial)
            misfit = (error * weights).square().flatten(1).sum(1)
            chosen = torch.where(expand(misfit < lowest, trial), trial, chosen)
            lowest = torch.minimum(lowest, misfit)
        return chosen

    def _lossless(self, backbone: Coder, target: Latent, start: Image, added: Image, free: Mask, cells: Mask) -> Bytes:
        levels = self.tone.levels().to(start.device)
        weights = channel_weights(backbone, target)
        if isinstance(backbone.autoencoder, BlockDCT):
            latent, weights = backbone.autoencoder, weights.double()
            return refine_blocks(latent, target, start, added * free, free, cells, weights, levels, self.pull)

        def refine_pixels(*part: Tensor) -> Bytes:
            return self._refine_pixels(backbone, weights, levels, *part)

        return in_chunks(
            refine_pixels, target, start, added * free, free, cells, chunk=backbone.chunk, fits=backbone.fits
        )

    def _refine_pixels(
        self,
        backbone: Coder,
        weights: Tensor,
        levels: Levels,
        target: Latent,
        start: Image,
        added: Image,
        free: Mask,
        cells: Mask,
    ) -> Bytes:
        def misfit(x: Image) -> tuple[Scores, Image]:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                error = (backbone.encode(x - added) - target) * weights[:, None, None]
                value = (error * cells).square().flatten(1).sum(1)
                (gradient,) = torch.autograd.grad(value.sum(), x)
            return value.detach(), gradient * free / 2

        levels = levels.to(start)
        low, high = (torch.where(free, end, start) for end in (levels[0], levels[-1]))
        x = descend(misfit, start, low, high, self.pull, self.descent)
        chosen = round_pixels(misfit, x, free, levels, self.rounding)
        return torch.where(free, chosen, to_bytes(start))


def channel_weights(backbone: Coder, like: Latent) -> Float[Tensor, " c"]:
    """Root mean square of what noise of deviation 1 in one cell of a channel does to the pixels, summed over the picture.

    Derived at the latent 0 from noise of deviation 0.01.
    """
    channels = like.shape[1]
    noise = 0.01 * torch.randn(PROBE, PROBE, generator=torch.Generator().manual_seed(0)).to(like)
    one_at_a_time = torch.eye(channels).to(like)[:, :, None, None] * noise
    change = backbone.decode(one_at_a_time) - backbone.decode(torch.zeros_like(one_at_a_time[:1]))
    weights: Tensor = change.flatten(1).norm(dim=1) / noise.norm()
    return weights


def refine_blocks(
    latent: BlockDCT,
    target: Latent,
    start: Image,
    added: Image,
    free: Mask,
    cells: Mask,
    weights: Tensor,
    levels: Levels,
    pull: float,
) -> Bytes:
    """The refined picture where E is the block DCT; float64, blocks independent of each other."""
    basis = torch.eye(3 * BLOCK**2, dtype=torch.float64, device=start.device)
    offset = latent.encode(torch.zeros(1, 3, BLOCK, BLOCK).to(basis)).flatten()
    B = ((latent.encode(basis.view(-1, 3, BLOCK, BLOCK)).flatten(1) - offset) * weights).T

    counted = cells[:, 0]
    blocks, blocks_added = (pixel_unshuffle(part.double(), BLOCK).movedim(1, 3) for part in (start, added))  # b u v 192
    blocks_free = pixel_unshuffle(free.expand_as(start).double(), BLOCK).movedim(1, 3) > 0
    x, movable = blocks[counted], blocks_free[counted]
    wanted = (target.double().movedim(1, 3)[counted] - offset) * weights + blocks_added[counted] @ B.T

    low, high = (torch.where(movable, end, x) for end in (levels[0], levels[-1]))
    chosen = round_blocks(B, wanted, project_blocks(B, wanted, x, low, high, pull), movable, levels)

    published = torch.where(blocks_free, nearest(blocks, levels), to_bytes(blocks))
    published[counted] = torch.where(movable, chosen, to_bytes(x))
    return pixel_shuffle(published.movedim(3, 1), BLOCK)


def project_blocks(
    B: Float[Tensor, "c p"],
    wanted: Float[Tensor, "n c"],
    start: Float[Tensor, "n p"],
    low: Float[Tensor, "n p"],
    high: Float[Tensor, "n p"],
    pull: float,
) -> Float[Tensor, "n p"]:
    """argmin |B x - wanted|^2 + pull |x - start|^2 over low <= x <= high, by Newton's method on the dual."""
    dual = torch.zeros_like(wanted)
    lengths = 0.5 ** torch.arange(STEP_LENGTHS).to(B)[:, None, None]
    ridge = pull * torch.eye(len(B)).to(B)
    todo = torch.arange(len(wanted), device=wanted.device)
    for _ in range(NEWTON_STEPS):
        x = start[todo] + dual[todo] @ B
        gradient = x.clamp(low[todo], high[todo]) @ B.T - wanted[todo] + pull * dual[todo]
        rough = gradient.norm(dim=1) > NEWTON_TOLERANCE
        todo, x, gradient = todo[rough], x[rough], gradient[rough]
        if not len(todo):
            break
        loose = (low[todo] < x) & (x < high[todo])
        step = torch.linalg.solve((B * loose[:, None]) @ B.T + ridge, gradient)
        trials = dual[todo] - lengths * step
        x = start[todo] + trials @ B
        inside = x.clamp(low[todo], high[todo])
        value = (inside * (x - inside / 2)).sum(2) - (trials * wanted[todo]).sum(2) + pull / 2 * trials.square().sum(2)
        dual[todo] = trials[value.argmin(0), torch.arange(len(todo), device=todo.device)]
    return (start + dual @ B).clamp(low, high)


def round_blocks(
    B: Float[Tensor, "c p"],
    wanted: Float[Tensor, "n c"],
    x: Float[Tensor, "n p"],
    movable: Bool[Tensor, "n p"],
    levels: Levels,
) -> Tensor:
    """Bytes (n p) for the movable pixels near x, such that B x keeps near `wanted`."""
    number = nearest(x, levels).long()
    gap = torch.cat([levels.diff(), levels.new_tensor([torch.inf])])
    gap_below = gap.roll(1)
    gram = B.T @ B
    gradient = (torch.where(movable, levels[number], x) @ B.T - wanted) @ B

    def single_moves(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Each pixel's way up and down (n 2p), 0 where it has none, and what that adds to the squared error."""
        move = torch.cat([gap[number[rows]], -gap_below[number[rows]]], 1)
        move = torch.where(movable[rows].repeat(1, 2) & move.isfinite(), move, 0)
        change = move * (2 * gradient[rows].repeat(1, 2) + move * gram.diagonal().repeat(2))
        return move, torch.where(move != 0, change, torch.inf)

    def make(rows: Tensor, pixel: Tensor, move: Tensor) -> None:
        number[rows, pixel] += move.sign().long()
        gradient[rows] += move[:, None] * gram[pixel]

    rows = torch.arange(len(x), device=x.device)
    for _ in range(ROUNDING_MOVES):
        move, change = single_moves(rows)
        lowest, best = change.min(1)
        lowers = lowest < NO_CHANGE
        rows, best, move = rows[lowers], best[lowers, None], move[lowers]
        if not len(rows):
            break
        make(rows, best[:, 0] % x.shape[1], move.gather(1, best)[:, 0])

    rows = torch.arange(len(x), device=x.device)
    for _ in range(PAIRED_MOVES):
        move, change = single_moves(rows)
        change, good = change.topk(min(PAIRED, x.shape[1]), dim=1, largest=False)
        pixel, move = good % x.shape[1], move.gather(1, good)
        both = gram[pixel[:, :, None], pixel[:, None, :]] * (2 * move[:, :, None] * move[:, None, :])
        both += change[:, :, None] + change[:, None, :]
        both.masked_fill_(pixel[:, :, None] == pixel[:, None, :], torch.inf)
        lowest, best = both.flatten(1).min(1)
        lowers = lowest < NO_CHANGE
        rows, pixel, move, best = rows[lowers], pixel[lowers], move[lowers], best[lowers]
        if not len(rows):
            break
        for one in (best // change.shape[1], best % change.shape[1]):
            make(rows, pixel.gather(1, one[:, None])[:, 0], move.gather(1, one[:, None])[:, 0])
    return number.to(torch.uint8)


def descend(misfit: Misfit, start: Image, low: Image, high: Image, pull: float, evaluations: int) -> Image:
    """argmin misfit(x) + pull |x - start|^2 over low <= x <= high, each picture's best of `evaluations`."""

    def objective(x: Image) -> tuple[Scores, Image]:
        (value, gradient), away = misfit(x), x - start
        return value + pull * away.square().flatten(1).sum(1), gradient + pull * away

    x = best = start.clamp(low, high)
    value, gradient = objective(x)
    lowest, length = value, value / (2 * dot(gradient, gradient)).clamp(min=TINY)
    for k in range(evaluations - 1):
        new = (x - expand(length, x) * gradient).clamp(low, high)
        value, new_gradient = objective(new)
        step, turn = new - x, new_gradient - gradient
        bend = dot(step, turn)
        longer, shorter = dot(step, step) / bend.clamp(min=TINY), bend / dot(turn, turn).clamp(min=TINY)
        length = torch.where(bend > 0, longer if k % 2 else shorter, length)
        x, gradient = new, new_gradient
        best = torch.where(expand(value < lowest, x), x, best)
        lowest = torch.minimum(lowest, value)
    return best


def round_pixels(misfit: Misfit, x: Image, free: Mask, levels: Levels, evaluations: int) -> Bytes:
    """Bytes for the free pixels near x of low misfit."""
    gap = torch.cat([levels.diff(), levels.new_tensor([torch.inf])])
    gap_below = gap.roll(1)
    number = nearest(x, levels).long()
    rounded = torch.where(free, levels[number], x)
    value, gradient = misfit(rounded)
    curvature = (value - misfit(x)[0]).clamp(min=0) / (rounded - x).square().flatten(1).sum(1).clamp(min=TINY)
    share = torch.ones_like(value)
    generator = torch.Generator().manual_seed(0)
    for _ in range(evaluations - 2):
        move = torch.where(gradient > 0, -gap_below[number], gap[number])
        change = move * (2 * gradient + expand(curvature, x) * move)
        change = torch.where(free & move.isfinite(), change, 0)
        best = -max_pool2d(-change.amin(1, keepdim=True), NEIGHBOURHOOD, 1, NEIGHBOURHOOD // 2)
        drawn = torch.rand(x.shape[-2:], generator=generator).to(x.device) < expand(share, x)
        moved = torch.where((change == best) & (change < 0) & drawn, move.sign(), 0).long()
        trial_value, trial_gradient = misfit(torch.where(free, levels[number + moved], x))
        better = trial_value < value
        number = number + moved * expand(better, x)
        gradient = torch.where(expand(better, x), trial_gradient, gradient)
        value, share = torch.minimum(value, trial_value), torch.where(better, 1.3 * share, share / 2).clamp(max=1)
    return number.to(torch.uint8)


def through_jpeg(published: Bytes, quality: int) -> Bytes:
    return torch.stack([jpeg(picture, quality) for picture in published]).to(published.device)


def dot(a: Image, b: Image) -> Scores:
    return (a * b).flatten(1).sum(1)


def nearest(x: Tensor, levels: Levels) -> Tensor:
    """The bytes whose levels are nearest to x."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
