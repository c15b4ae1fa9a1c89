"""Command lines over the keyanon library: run, tables, plots, report, train."""

import keyanon  # noqa: F401  before any module here imports diffusers or torchmetrics: see keyanon.torchvision_shim
