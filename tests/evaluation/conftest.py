from pathlib import Path
import pytest
@pytest.fixture(scope="session")
def tiny():
    return Path(__file__).parents[1] / "tiny" / "llama"
