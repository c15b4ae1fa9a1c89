"""Timings. None of them is a test; each prints the machine it ran on."""

import keyanon  # noqa: F401  before diffusers is imported: see keyanon.torchvision_shim
