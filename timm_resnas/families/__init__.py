"""Searchable families: one file each, with the space and the supernet. Importing them registers the supernets."""

from . import autoformer, elastic, elastic_tokens, vit_resnas  # noqa: F401
