"""One test file per pass; `helpers.py` says how a pass is tested."""

import pytest

pytest.register_assert_rewrite("tests.passes.helpers")
