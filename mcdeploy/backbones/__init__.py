"""Backbones that timm does not have. Importing this package registers them with ``timm.create_model``."""

from mcdeploy.backbones import cifar_resnet, multibranch, nnmass_cells, sparsenet

__all__ = ["cifar_resnet", "multibranch", "nnmass_cells", "sparsenet"]
