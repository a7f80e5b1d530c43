"""Programs that find, train, measure and publish models; the wheel has them as ``timm_resnas.recipes``."""
