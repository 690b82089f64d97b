"""Packaging of dualstream: every top-level folder is importable as ``dualstream.<folder>``."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"
FOLDERS = (
    "modeling",
    "processing",
    "data_builders",
    "train",
    "eval",
    "analysis",
    "hub_cards",
    "benchmarks",
)

packages, package_dir = ["dualstream"], {"dualstream": "src/dualstream"}
for folder in FOLDERS:
    package_dir[f"dualstream.{folder}"] = folder
    packages.append(f"dualstream.{folder}")
    packages += [f"dualstream.{folder}.{name}" for name in find_packages(folder)]

# transformers: the compression relies on `mm_encoder_outputs`, which 5.23 is the first tested release to accept.
REQUIRED = [
    "torch>=2.13",
    "torchvision>=0.28",
    "transformers>=5.23,<6",
    "tokenizers>=0.21",
    "safetensors>=0.5",
    "numpy>=1.26",
    "scipy>=1.13",
    "jinja2>=3.1",
    "pillow>=11",
    "datasets>=5.2",
    "pyarrow>=21",
    "pyyaml>=6",
    "defusedxml>=0.7.1",
    "tqdm>=4.66",
]
TRAIN = ["accelerate>=1.15", "trl>=1.16", "peft>=0.21", "matplotlib>=3.9"]
ANALYSIS = ["matplotlib>=3.9", "pandas>=3.1", "scikit-learn>=1.9", "pycocotools>=2.0.11"]
EVALUATE = "evaluate>=0.4.6"
EVAL = ["lmms-eval>=0.7.3", "matplotlib>=3.9", EVALUATE]
SPACE = ["gradio>=6.31"]
DEV = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.11",
    "mypy>=1.14",
    "build>=1.2",
    "ipykernel>=7.4",
    "nbclient>=0.11",
    "nbformat>=5.11",
    "setuptools>=77",
    *ANALYSIS,
    *EVAL,
    *TRAIN,
]

setup(
    name="dualstream",
    version=VERSION,
    description="Read what a vision-language model sees as text, and answer from fewer visual tokens.",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages,
    package_dir=package_dir,
    package_data={
        "dualstream": ["py.typed"],
        "dualstream.modeling": ["checkpoints/**/*"],
        "dualstream.data_builders": ["**/*.md"],
        "dualstream.eval": ["tasks/*", "metrics/*/*"],
        "dualstream.train": ["**/*.yaml", "**/*.md"],
        "dualstream.processing": ["templates/*"],
        "dualstream.analysis": ["templates/*", "**/*.yaml"],
        "dualstream.hub_cards": ["**/*.md", "**/*.txt"],
    },
    install_requires=REQUIRED,
    extras_require={"train": TRAIN, "analysis": ANALYSIS, "eval": EVAL, "space": SPACE, "dev": DEV},
    entry_points={
        "console_scripts": ["dualstream = dualstream.cli:main"],
        "lmms_eval.models": ["dualstream = dualstream.eval.lmms_model:manifests"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
