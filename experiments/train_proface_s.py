"""Train PRO-Face S (keyanon/methods/baselines/proface_s.py): `python -m experiments.train_proface_s data.root=...`.

    P(a, b) = 1 - SSIM(a, b),  R(a, b) = root mean square of a - b,  T_d = max(0, d(x, rec) - d(x, wrong) + margin_d)
    minimize  looks (w P(obf, prot) + |obf - prot|_1) + recovers |x - rec|_1 + refuses (T_P + T_R)

with fresh random keys at every step; `wrong`, what an unrelated key recovers, is taken of half of each batch. As the authors' loss
in its "random" mode, but for P, which is the distance of a pretrained network there (LPIPS), and the margins and w that go
with it. With `rounded`, what is recovered from are the 8 bits of a file; rounding and clipping pass gradients unchanged.

Crops are hidden, not whole pictures: the network is convolutional, and a step costs less. The exported weights are the exponential
moving average, in half precision.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from experiments.harness.command import in_one_line
from experiments.harness.made import made
from experiments.harness.training import Task, check, fit, load_pictures
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.methods.baselines.proface_s import HidingNetwork, hide, reveal
from keyanon.types import Image, Scores

log = logging.getLogger(__name__)


def loss(
    net: HidingNetwork,
    originals: Image,
    covers: Image,
    generator: torch.Generator,
    rounded: bool,
    weight: Mapping[str, float],
) -> Tensor:
    """Of one batch, at least two pictures."""
    b, _, height, width = originals.shape
    right, wrong = (torch.randint(0, 2, (2, b, 1, height, width), generator=generator) * 2.0 - 1).to(originals)
    protected = hide(net, covers, originals, right)
    sent = through_a_file(protected) if rounded else protected
    some = originals[: b // 2]
    seen = reveal(net, torch.cat([sent, sent[: b // 2]]), torch.cat([right, wrong[: b // 2]]))
    recovered, guessed = seen[:b], seen[b:]
    looks = weight["perceptual"] * unlike(covers, protected).mean() + (covers - protected).abs().mean()
    recovers = (originals - recovered).abs().mean()
    refuses = torch.zeros(())
    for distance, margin in ((unlike, weight["margin_perceptual"]), (rms, weight["margin_rms"])):
        gap = distance(some, recovered[: b // 2]) - distance(some, guessed)
        refuses = refuses + torch.relu(gap + margin).mean()
    return weight["looks"] * looks + weight["recovers"] * recovers + weight["refuses"] * refuses


def through_a_file(images: Image) -> Image:
    """Rounded to the levels of a file; gradients pass as if they were not."""
    return images + (to_floats(to_bytes(images)) - images).detach()


def unlike(a: Image, b: Image) -> Scores:
    """1 - SSIM, which is defined for brightness from 0 up."""
    similar = structural_similarity_index_measure((a + 1) / 2, (b + 1) / 2, data_range=1.0, reduction="none")
    return 1 - torch.as_tensor(similar)


def rms(a: Image, b: Image) -> Scores:
    return (a - b).square().mean((1, 2, 3)).add(1e-8).sqrt()


def cropped(pictures: Image, size: int, generator: torch.Generator) -> Image:
    """A random square of each picture."""
    height, width = pictures.shape[-2:]
    top = torch.randint(0, height - size + 1, (len(pictures),), generator=generator).tolist()
    left = torch.randint(0, width - size + 1, (len(pictures),), generator=generator).tolist()
    return torch.stack([p[:, i : i + size, j : j + size] for p, i, j in zip(pictures, top, left, strict=True)])


@hydra.main(config_path="../conf/train", config_name="proface_s", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with in_one_line():
        check(cfg)
        train(cfg)


def train(cfg: DictConfig) -> None:
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.threads)
    export = Path(cfg.export)
    pictures, _ = load_pictures(cfg.data.root, cfg.data.size, cfg.data.heldout)
    log.info("%d training pictures", len(pictures))
    obfuscators = made(cfg, "obfuscators")
    weight = {str(name): float(value) for name, value in cfg.weight.items()}
    net = made(cfg, "network")
    if cfg.begin_with is not None:
        net.load_state_dict(load_file(cfg.begin_with))
    net.to(torch.device(cfg.device))

    def hiding(images: Image, generator: torch.Generator) -> Tensor:
        obfuscate = obfuscators[int(torch.randint(0, len(obfuscators), (), generator=generator))]
        covers = obfuscate(images, torch.ones_like(images[:, :1], dtype=torch.bool))
        both = cropped(torch.cat([images, covers], 1), cfg.data.crop, generator)
        return loss(net, both[:, :3], both[:, 3:], generator, cfg.rounded, weight)

    def write() -> None:
        export.mkdir(parents=True, exist_ok=True)
        half = {name: value.half().cpu().contiguous() for name, value in net.state_dict().items()}
        save_file(half, export / "model.safetensors")

    # eps and decay as the authors'
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.learning_rate, eps=1e-6, weight_decay=1e-5)
    fit(cfg, Task(net, hiding, write), optimizer, pictures)


if __name__ == "__main__":
    main()
