"""Operations and bytes of one evaluation of a network, counted, not timed: `python -m benchmarks.counts`.

Two operations for each multiply-add of convolutions and matrix products, attention included (torch.utils.flop_counter). Bytes in
fp32: the weights, read once a call whatever the batch; and what each layer reads and writes for one picture, had it no cache and
were nothing fused. On meta tensors: nothing is computed, no weights are needed. Measured: results/benchmarks/counts.csv.
"""

import csv
import json
import sys
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ldm256

COLUMNS = ["network", "part", "parameters_m", "gflop", "weights_mb", "activations_mb"]


def main() -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, part, net, given, call in parts():
        weights = sum(parameter.numel() for parameter in net.parameters())
        flops, moved = counted(net, given, call)
        writer.writerow(
            [name, part, *(f"{x:.4g}" for x in (weights / 1e6, flops / 1e9, 4 * weights / 1e6, moved / 1e6))]
        )


def parts() -> list[tuple[str, str, nn.Module, tuple[int, ...], str]]:
    """Network, part, module, shape of its input, and the method that is called."""
    with torch.device("meta"):
        vqvae, kl = VQModel(**ldm256.VQVAE), AutoencoderKL.from_config(config("faces128_kl", "vae"))
        return [
            ("faces128", "unet", UNet2DModel.from_config(config("faces128", "unet")), (1, 21, 16, 16), "forward"),
            ("faces128_kl", "unet", UNet2DModel.from_config(config("faces128_kl", "unet")), (1, 16, 16, 16), "forward"),
            ("faces128_kl", "encoder", kl, (1, 3, 128, 128), "encode"),
            ("faces128_kl", "decoder", kl, (1, 16, 16, 16), "decode"),
            ("ldm256", "unet", UNet2DModel(**ldm256.UNET), (1, 3, 64, 64), "forward"),
            ("ldm256", "encoder", vqvae, (1, 3, 256, 256), "encode"),
            ("ldm256", "decoder", vqvae, (1, 3, 64, 64), "decode"),
        ]


def config(network: str, part: str) -> Mapping[str, Any]:
    text = (files("keyanon") / "assets" / network / part / "config.json").read_text()
    found: Mapping[str, Any] = json.loads(text)
    return found


def counted(net: nn.Module, shape: tuple[int, ...], call: str) -> tuple[float, int]:
    """Operations, and bytes of what the layers read and wrote."""
    moved = 0

    def count(module: nn.Module, taken: tuple[Any, ...], given: Any) -> None:
        nonlocal moved
        moved += sum(tensor.nbytes for tensor in (*taken, given) if isinstance(tensor, Tensor))

    hooks = [module.register_forward_hook(count) for module in net.modules() if not list(module.children())]
    arguments = [torch.zeros(shape, device="meta")]
    if call == "forward":
        arguments.append(torch.zeros(1, dtype=torch.long, device="meta"))
    extra = {"force_not_quantize": True} if isinstance(net, VQModel) and call == "decode" else {}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        getattr(net, call)(*arguments, **extra)
    for hook in hooks:
        hook.remove()
    return float(counter.get_total_flops()), moved


if __name__ == "__main__":
    main()
