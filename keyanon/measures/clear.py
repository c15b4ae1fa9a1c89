"""Whether a face was published in clear: what is at its place on the published picture is still the original.

    core        of the face's box, from eyes to mouth: 0.2 to 0.8 of its width, 0.25 to 0.85 of its height; grey, 48 x 48 pixels
    contrast    each pixel less the mean of the 5 x 5 around: a change of tone hides nobody, and a blur leaves the rest
    alike       the correlation of both contrasts in 3 x 3 parts of the core, of which the third lowest counts

So a face is in clear if seven of its nine parts are as they were, also where a neighbour's blur reaches into it. From 0.75 on it
counts as the same. Measured on six bundled faces and six of CelebA-HQ, 128 px:

    treated      the highest of twelve: 0.62 after NullFace's sampler, 0.52 after a median, 0.30 or less after all other methods
    noise flip   0.69 to 0.95: DiffStega's key hides little, and most of its faces count as in clear
    untreated    the lowest of twelve: 0.96 through the bundled autoencoder, 0.92 as JPEG of quality 30, 0.85 with noise of 5 %
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, interpolate, pad

from keyanon.faces.detection import Points
from keyanon.faces.finding import same
from keyanon.types import Picture

SAME_PICTURE = 0.75
SIDE, AROUND, PARTS = 48, 5, 3  # pixels, pixels, parts a side
LOWER = 2  # of the nine parts this many may be changed
CORE = np.array([0.2, 0.25, 0.8, 0.85])  # left, top, right, bottom as fractions of a box


def in_clear(original: Picture, published: Picture, places: Sequence[Points]) -> int:
    """How many faces are in clear at some places, boxes (4,); boxes of one face count once."""
    clear: list[Points] = []
    for place in places:
        if not any(same(place, other) for other in clear) and alike(original, published, place) >= SAME_PICTURE:
            clear.append(place)
    return len(clear)


def alike(original: Picture, published: Picture, box: Points) -> float:
    """How alike two pictures are inside a face's box: 1 for equal ones, about 0 for unrelated ones and where one is flat."""
    width, height = original.shape[-1], original.shape[-2]
    core = box[[0, 1, 0, 1]] + CORE * np.tile(box[2:] - box[:2], 2)
    left, top = np.clip(np.round(core[:2]).astype(int), 0, (width - 1, height - 1))
    right, bottom = np.clip(np.round(core[2:]).astype(int), (left + 1, top + 1), (width, height))
    grey = torch.stack([picture[:, top:bottom, left:right].mean(0, keepdim=True) for picture in (original, published)])
    small = interpolate(grey, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    margin = AROUND // 2
    contrast = small - avg_pool2d(pad(small, [margin] * 4, mode="replicate"), AROUND, stride=1)
    step = SIDE // PARTS
    parts = contrast.unfold(2, step, step).unfold(3, step, step).reshape(2, PARTS**2, step**2)
    parts = parts - parts.mean(2, keepdim=True)
    a, b = parts / parts.norm(dim=2, keepdim=True).clamp(min=1e-3)
    return float((a * b).sum(1).sort().values[LOWER])
