"""What verl loads through its entry-point group "verl.plugins"; importing it installs the metrics.

It does not raise: verl mentions a plug-in that fails in its debug log only, so what failed is a warning here.
"""

import logging

try:
    from rlvr_fast.integrations.verl import install, installed

    if not installed():  # verl has imported VERL_USE_EXTERNAL_MODULES by now, and one of those may have set arguments
        install()
except Exception as error:
    logging.getLogger(__name__).warning(
        "rlvr_fast: its verl plug-in cannot be loaded, training goes on without: %s: %s (the command rlvr-fast doctor "
        "says what is broken; VERL_USE_EXTERNAL_PLUGINS=none keeps the plug-in out)", type(error).__name__, error)
