"""Map the top-level folders into the package: memories/mesa is layerzoo.memories.mesa."""

from setuptools import find_packages, setup

ROOTS = ("layerzoo", "memories", "attention", "kernels", "ablations")


def name(root: str) -> str:
    return root if root == "layerzoo" else f"layerzoo.{root}"


setup(
    packages=[
        package
        for root in ROOTS
        for package in (name(root), *(f"{name(root)}.{sub}" for sub in find_packages(root)))
    ],
    package_dir={name(root): root for root in ROOTS},
)
