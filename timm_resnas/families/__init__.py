"""Searchable families: one file each, with the space and the supernet. Importing them registers the supernets."""

from . import autoformer, elastic, vit_resnas  # noqa: F401
