"""Packaging: the top-level folders become the packages of one import name, `subcircuit`."""

from pathlib import Path

from setuptools import setup

FOLDERS = {
    "subcircuit": "api",
    "subcircuit.engine": "engine",
    "subcircuit.engine.patching": "engine/patching",
    "subcircuit.kernels": "kernels",
    "subcircuit.weights": "weights",
    "subcircuit.analysis": "analysis",
    "subcircuit.analysis.tasks": "analysis/tasks",
    "subcircuit.commands": "api/commands",
}

TEST = ["pytest>=8", "hypothesis>=6", "transformers>=4.56", "tokenizers>=0.20", "protobuf>=4"]

setup(
    name="subcircuit",
    version="0.1.0",
    description="A from-scratch GPT-2/Llama engine with hooks, fast exact activation patching and circuit discovery",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir=FOLDERS,
    packages=list(FOLDERS),
    package_data={
        "subcircuit": ["py.typed"],
        "subcircuit.kernels": ["native.c"],
        "subcircuit.weights": ["data/tiny-gpt2/*"],
        "subcircuit.analysis": ["templates/*"],
    },
    install_requires=[
        "torch>=2.8",
        "numpy>=1.26",
        "safetensors>=0.4",
        "tiktoken>=0.8",
        "regex",
        "sentencepiece>=0.2",
        "triton>=3.4; platform_system == 'Linux'",
        "jaxtyping>=0.2.36",
        "gguf>=0.10",
        "typer>=0.15",
        "rich>=13",
        "matplotlib>=3.9",
        "jinja2>=3.1",
    ],
    extras_require={
        "hub": ["huggingface_hub>=0.26"],
        "test": TEST,
        "dev": [*TEST, "ruff>=0.9", "mypy>=1.14"],
    },
    entry_points={"console_scripts": ["subcircuit = subcircuit.cli:main"]},
)
