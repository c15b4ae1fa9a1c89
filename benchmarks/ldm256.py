"""The network of LDM-FFHQ and CompVis/ldm-celebahq-256 with random weights, which compute as fast as trained ones."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel, VQModel

UNET = {  # 274.1 M parameters
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 32,
}
VQVAE = {  # 55.3 M parameters
    "block_out_channels": (128, 256, 512),
    "layers_per_block": 2,
    "latent_channels": 3,
    "num_vq_embeddings": 8192,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}


def saved(folder: Path, device: str = "cpu") -> Path:
    """The model in diffusers' layout, drawn on `device` and written (1.3 GB) if it is not yet in `folder`."""
    if not (folder / "scheduler").is_dir():
        torch.manual_seed(0)
        with torch.device(device):
            UNet2DModel(**UNET).save_pretrained(folder / "unet")
            VQModel(**VQVAE).save_pretrained(folder / "vqvae")
        DDIMScheduler(**NOISE).save_pretrained(folder / "scheduler")  # last: with it the folder is whole
    return folder
