"""Stand-ins for published weights: files that are read, checked and computed with as the real ones are, and hold random numbers.

Where the project fixes a network's sizes, a few numbers stand for all of them, so that the files are small.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from keyanon.faces.retinaface import RetinaFace
from tests.conftest import save_tiny_ldm
from tests.test_backbones import save_tiny_face_transformer, save_tiny_iresnet
from tests.test_controlnet import checkpoint, random_network
from tests.test_parsing import colour_parser


def slid(shapes: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Numbers for a network of these shapes. A layer's rows are windows that slide along one: all that torch.save keeps."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, each in shapes.items():
        if not each.is_floating_point():
            state[name] = torch.zeros(each.shape, dtype=each.dtype)
        elif each.dim() > 1:
            inputs = each[0].numel()
            row = torch.randn(inputs + len(each) - 1, generator=generator) * (2 / inputs) ** 0.5
            state[name] = row.as_strided(each.shape, (1, *each.stride()[1:]))
        else:
            state[name] = torch.full(each.shape, float(name.endswith(("running_var", "weight"))))
    return state


def facenet(path: Path) -> None:
    """Inception-ResNet v1, with a classifier, which the published files have and nobody reads."""
    from facenet_pytorch import InceptionResnetV1

    with torch.device("meta"):
        shapes = InceptionResnetV1(pretrained=None).state_dict()
    torch.save(slid(shapes, len(path.name)) | {"logits.weight": torch.zeros(2000, 512)}, path)


def retinaface(path: Path) -> None:
    """Heads say little, as boxes grow by powers of e."""
    with torch.device("meta"):
        shapes = RetinaFace().state_dict()
    state = {name: value / 100 if "Head" in name else value for name, value in slid(shapes, 0).items()}
    torch.save({f"module.{name}": value for name, value in state.items()}, path)


def inception(path: Path) -> None:
    """Torch-fidelity's Inception."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    from torchmetrics.image.fid import NoTrainInceptionV3

    with (
        patch.object(fidelity, "load_state_dict_from_url", lambda *_, **__: {}),
        patch.object(NoTrainInceptionV3, "load_state_dict", lambda *_: None),
        torch.device("meta"),
    ):
        shapes = NoTrainInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    torch.save(slid(shapes, 0), path)


def controlnet(path: Path) -> None:
    """Goes with the network of the tiny model beside it."""
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(path.parents[2] / "ffhq-diffusers" / "unet")
    torch.save(checkpoint(unet, random_network(unet)), path)


def order(path: Path) -> None:
    """All names of CelebA-HQ; the first three, which the rehearsal has, the other way round."""
    path.write_text(str([f"{number}.jpg" for number in (2, 1, 0, *range(3, 30_000))]))


# What writes a model: by its repository on the hub and the folder there.
MODELS: dict[str, Callable[[Path], object]] = {
    "PolLabarbarie/diffusion-signflip-anon-face/ffhq-diffusers": save_tiny_ldm,
}
# What writes a card's file, by the card; where the card does not say in which folder of the hub it lies, in this one.
CARDS: dict[str, Callable[[Path], object]] = {
    "facenet_vggface2": facenet,
    "facenet_casia": facenet,
    "arcface_r50": save_tiny_iresnet,
    "adaface_vit": save_tiny_face_transformer,
    "retinaface_r50": retinaface,
    "bisenet": colour_parser,
    "fid_inception": inception,
    "controlnet_masks": controlnet,
    "celebahq_order": order,
}
ANY_FOLDER = "controlnets"
