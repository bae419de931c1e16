"""``rlvr-fast bench``: microbenchmarks on the CPU beside a bare product, torch eager, torch.compile, autograd and TRL.

A suite is one question asked of several providers (``suite``); inputs are in ``workload``, float64 answers in
``truth``. ``test_interleaved`` and its plug-in ``turns`` are timed by pytest-benchmark, ``memory`` measures peaks in
processes of their own, ``results`` makes rows and a table, ``command`` puts them together.
"""
