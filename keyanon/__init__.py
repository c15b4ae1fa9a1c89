"""keyanon: reproduce, compare and attack secret-key reversible face anonymization with diffusion models (arXiv 2510.01031)."""

from keyanon import torchvision_shim
from keyanon.version import __version__

__all__ = ["__version__"]

torchvision_shim.install()
