"""A face brought to a place: least-squares similarity onto five points."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from keyanon.faces.detection import Points
from keyanon.types import BadPicture, Picture

# Eyes, nose tip, mouth corners (left on the picture first) on UTKFace's aligned crops at 128 px, in fractions of the
# side: the mean of MtcnnDetector's points on 599 of 600 random pictures; they scatter by 0.02 (eyes) to 0.04 (mouth)
# around it.
FACES128_TEMPLATE: Points = np.array(
    [[0.3067, 0.2977], [0.6993, 0.2967], [0.4982, 0.5320], [0.3262, 0.7051], [0.6794, 0.7045]]
)


def align(
    picture: Picture, points: Points, size: int, template: Points = FACES128_TEMPLATE
) -> Float[Tensor, "3 size size"]:
    """The picture turned, scaled and shifted so that its five `points` come to lie on `template`, `size` pixels a side.

    `template` (5, 2) is in fractions of the side. Least-squares similarity; smoothed before it is made smaller; the
    picture's edge is continued where the result reaches beyond it.
    """
    from skimage.filters import gaussian
    from skimage.transform import SimilarityTransform, warp

    transform = SimilarityTransform.from_estimate(points, template * size - 0.5)
    if not transform:
        raise BadPicture(f"these five points cannot be aligned: {points.tolist()} ({transform})")
    pixels = picture.permute(1, 2, 0).double().cpu().numpy()
    blur = max(0.0, (1 / transform.scale - 1) / 2)
    smooth = gaussian(pixels, blur, mode="nearest", channel_axis=-1) if blur else pixels
    warped = warp(smooth, transform.inverse, output_shape=(size, size), order=1, mode="edge")
    return torch.from_numpy(warped).permute(2, 0, 1).to(picture)
