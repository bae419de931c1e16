"""What verl loads through its entry-point group "verl.plugins"; importing it installs the metrics."""

import logging

try:
    from rlvr_fast.integrations.verl import install

    install()
except Exception as error:  # verl itself mentions a plugin that fails in its debug log only
    logging.getLogger(__name__).warning("rlvr_fast: the verl plugin failed: %s: %s", type(error).__name__, error)
    raise
