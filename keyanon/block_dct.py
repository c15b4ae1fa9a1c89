"""The old place of the block-DCT latent, which the model_index.json of earlier models names."""

from keyanon.diffusion.block_dct import BlockDCT

__all__ = ["BlockDCT"]
