"""What an H100 is predicted to take for a launch, from its budget. Predicted, never measured: no GPU has run any of it.

    time = max(bytes / bandwidth, issue slots / rate, one launch)

It knows nothing of latency, occupancy, caches or the last wave of blocks: it is a bound that a real launch comes near at best.
"""

from typing import NamedTuple

# H100 SXM5 80 GB. Bandwidth and multiprocessors: NVIDIA H100 Tensor Core GPU datasheet (3.35 TB/s HBM3) and the "NVIDIA H100
# Tensor Core GPU Architecture" white paper (132 multiprocessors with four schedulers each, every one of which issues one warp
# instruction a clock). Clock: 1.755 GHz, what such a GPU holds under load; its peak of 67 TFLOPS in float32 is
# reached at 1.98 GHz, where the slots go 13 % further. Multiplications of integers run at half the rate (64 results a clock and
# multiprocessor for compute capability 9.0, CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"):
# those to more than 32 bits count twice. A launch: the time from one small kernel to the next in a stream, 2 to 3 microseconds.
BANDWIDTH = 3.35e12  # bytes a second
SLOTS = 132 * 4 * 32 * 1.755e9  # instructions of threads a second
LAUNCH = 2.5e-6  # seconds


class Prediction(NamedTuple):
    """Of a launch by its number of elements. share: of the memory roofline, for large launches."""

    memory: float  # seconds an element
    issue: float
    share: float

    @property
    def launch_bound(self):
        """Below so many elements one launch takes longer than what it does."""
        return LAUNCH / max(self.memory, self.issue)

    def seconds(self, elements):
        return max(LAUNCH, elements * self.memory, elements * self.issue)


def predict(row):
    """``Prediction`` for a row of the budgets for sm_90."""
    memory = (row["loaded"] + row["stored"]) / BANDWIDTH
    issue = (row["sass"] + row["double"]) / SLOTS
    return Prediction(memory, issue, memory / max(memory, issue))
