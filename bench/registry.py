"""All suites by name, in the order of the table."""

from gap_suites import HEAD, HIDDEN, LOGITS
from head_suites import LINEAR_LOGPROB, TOKEN_STATS
from step_suites import ADVANTAGES, MEASURE_STEP

SUITES = {suite.name: suite for suite in (TOKEN_STATS, HIDDEN, LOGITS, HEAD, LINEAR_LOGPROB, ADVANTAGES, MEASURE_STEP)}
