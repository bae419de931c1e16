"""The GPU run: one command that checks and measures the kernels beside named peers (see bench/NOTES.md).

``launch.py`` prepares a bare machine and starts one process per stage; ``stages.py`` and ``check.py`` are the stages; a
suite is one question asked of several providers (``suite.py``), measured by ``measure.py`` with a clock of
``clock.py``. ``plots.py`` and ``targets.py`` read nothing but the CSV files.
"""
