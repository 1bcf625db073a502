"""The pytest plugin of fastdiff: one fixture. Nothing heavy is imported before a test asks for it.

    def test_bits(fastdiff_golden):
        fastdiff_golden("cuda")
"""

import pytest

__all__ = ["fastdiff_golden"]


@pytest.fixture(scope="session")
def fastdiff_golden():
    """``fastdiff.testing.assert_backends_agree``, skipping the test where the device is not there.

    fastdiff_golden(device="cuda", *, backends=None, cases=None, time_limit=600.0) returns the report of what ran; it fails
    the test with backend, case and the first element that differs, and skips it with each backend's reason where none of
    them can be run. A name that is not known raises, also where the test would be skipped.
    """

    def check(device="cuda", **options):
        from fastdiff import testing
        from fastdiff.testing.call import check_call

        check_call(device, **options)
        wanted = options.get("backends")
        there = [b for b in testing.available(device) if wanted is None or b.name in wanted]
        if there and not any(b.usable for b in there):
            pytest.skip("; ".join(f"{b.name}: {b.reason}" for b in there))
        return testing.assert_backends_agree(device, **options)

    return check
