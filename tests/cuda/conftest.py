"""Helpers of this folder under names of their own: a module called `cuda` would shadow NVIDIA's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
