"""The list of packages; all else is in pyproject.toml."""

from setuptools import find_packages, setup

# recipes/ is installed inside the package: a clone and an installation run the same files
setup(
    packages=[*find_packages(include=["timm_resnas", "timm_resnas.*"]), "timm_resnas.recipes"],
    package_dir={"timm_resnas.recipes": "recipes"},
)
