"""How hard the property tests try: `HYPOTHESIS_PROFILE` is `default`, `ci` or `nightly`."""

import os

from hypothesis import settings

# No deadline: how long one example takes says more about the machine than about the code.
settings.register_profile("default", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None)
settings.register_profile("nightly", max_examples=5_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
