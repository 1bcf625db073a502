"""How much is searched, drawn and timed: the same for every method."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BUDGETS", "Budget"]


@dataclass(frozen=True)
class Budget:
    """settings: per method; extra: most settings more where the best lies at the end of its grid; search_samples: of each
    setting, over all classes; samples, samples_recurrent: of each class, in the results, and for methods with several
    recurrences; rounds: of the interleaved timing; extra_samples: of each cell of the studies beside the table."""

    settings: int
    extra: int
    search_samples: int
    samples: int
    samples_recurrent: int
    rounds: int
    extra_samples: int
    classes: tuple[int, ...] = tuple(range(10))
    draws: int = 200


BUDGETS = {
    "full": Budget(settings=20, extra=6, search_samples=128, samples=200, samples_recurrent=100, rounds=3, extra_samples=128),
    "medium": Budget(settings=12, extra=6, search_samples=128, samples=200, samples_recurrent=100, rounds=3, extra_samples=64),
    "short": Budget(
        settings=6, extra=2, search_samples=64, samples=64, samples_recurrent=64, rounds=2, extra_samples=64, classes=(1, 6, 7)
    ),
    "smoke": Budget(
        settings=2, extra=1, search_samples=8, samples=8, samples_recurrent=8, rounds=1, extra_samples=8, classes=(1, 6), draws=10
    ),
}
