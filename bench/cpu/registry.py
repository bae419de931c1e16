"""All suites by name, in the order of the table."""

from rlvr_fast.bench.gap_suites import HEAD, HIDDEN, LOGITS
from rlvr_fast.bench.head_suites import LINEAR_LOGPROB, TOKEN_STATS
from rlvr_fast.bench.step_suites import ADVANTAGES, MEASURE_STEP

SUITES = {suite.name: suite for suite in (TOKEN_STATS, HIDDEN, LOGITS, HEAD, LINEAR_LOGPROB, ADVANTAGES, MEASURE_STEP)}
