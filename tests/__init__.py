"""Tests. A package, because torch-fidelity installs one called tests that would stand before a folder of that name."""
