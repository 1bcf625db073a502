"""Imported before torch by the programs of the zoo: how OpenMP's threads wait for one another.

Threads that spin while they wait starve one another when another program takes a core: a training step was measured to
take 25 times as long. A bounded spin, then sleep, costs nothing on idle cores. libgomp reads this when torch is loaded.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
