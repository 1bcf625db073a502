"""What the GPU backends would launch, executed without a GPU and compared with the exact reference in every bit."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "cuda"))  # cuda_build
