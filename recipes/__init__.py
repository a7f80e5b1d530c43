"""The jobs, one file each; the installed package has them as ``timm_resnas.recipes``."""
