"""For all tests: properties are tried on the same examples each time, so that a change decides what fails.

`HYPOTHESIS_PROFILE=explore make test` tries others each time.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("steady", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))
