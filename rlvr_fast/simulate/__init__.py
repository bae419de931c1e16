"""The theory reproduced on problems whose truth is known exactly.

``problems`` are enumerated policies that can also be sampled; ``rules`` turn their gradients into updates; ``lines``
gives the exact effect of a step. Each experiment (``threshold``, ``collapse``, ``scaling``, ``stagnation``,
``coverage``) is one command of ``python -m rlvr_fast.simulate`` and uses the package as it is: what it reports about
the estimators is what their users get.

``relay`` reproduces the second theory, learning at the edge of competence: commands ``relay`` and ``plateau``.
"""
