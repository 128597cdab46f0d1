"""Which folders are packages: all of src, and the top-level conversion/ as nemotron_h_hf.conversion."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("src"), "nemotron_h_hf.conversion"],
    package_dir={"": "src", "nemotron_h_hf.conversion": "conversion"},
)
