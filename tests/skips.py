"""The one list of reasons for which a test may be skipped.

A test that is skipped for any other reason fails the run (see `conftest.py`), so that nothing goes untested unseen.
Write `pytest.skip(skips.NO_CUDA)` or `pytest.mark.skipif(..., reason=skips.NO_CUDA)`.

A check of the shared model tests that cannot apply to an architecture is no skip: the architecture's test class
declares it in `not_applicable` (see `tests/hf_models/model_tests.py`), and the run prints all declarations together.
"""

NO_CUDA = "needs a CUDA GPU"
NO_BROWSER = "needs Chromium"
NO_SCIKIT_LEARN = "needs scikit-learn, of the extra `baselines`"
NO_TORCHAO = "needs torchao, of the extra `quantized`"

PERMITTED: frozenset[str] = frozenset({NO_CUDA, NO_BROWSER, NO_SCIKIT_LEARN, NO_TORCHAO})
