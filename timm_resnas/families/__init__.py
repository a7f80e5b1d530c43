"""Searchable families: one file each, with the space and the supernet. Importing them registers the supernets."""

from . import (  # noqa: F401
    autoformer,
    efficientformer_nas,
    efficientformerv2_nas,
    elastic,
    elastic_tokens,
    vit_resnas,
)
