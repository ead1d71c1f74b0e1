"""Environment of every test: no telemetry, no download counts, a cache folder of its own, one CPU thread a process."""

import gc
import os
import tempfile
from pathlib import Path

import pytest


# Read by the Hugging Face libraries when they are imported, so set before any of them is
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="first_trl_hf_")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# With more, the threads of two workers wait for each other on two cores: runs of seconds take minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels run in Triton's interpreter, on any CPU

# Public benchmark files and tiny pretrained models for the tests that use real data
DATA = Path(os.environ.get("FIRST_TRL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="module", autouse=True)
def what_stays_is_not_collected() -> None:
    """
    Every training ends with `gc.collect()`, and that walks over a million objects of libraries and tests: half a second,
    most of the time of a tiny training. What is alive between two files stays so, and is taken out of its sight.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # at exit, Triton reports as leaked what was not freed


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of real data; the test is skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}; set FIRST_TRL_TEST_DATA to a copy")
    return DATA


@pytest.fixture(scope="session")
def stories(data_folder: Path) -> str:
    """Path of a pretrained 260k-parameter Llama with its tokenizer."""
    return str(data_folder / "tiny_llama" / "stories260K")
