"""Rival methods under the same Protocols, one file each."""
