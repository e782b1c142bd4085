"""Makes the process launcher and the helpers beside these tests importable, in the processes that they start as well."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "distributed")]
