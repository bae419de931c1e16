"""The step-size theory reproduced on problems whose truth is known exactly.

``problems`` are enumerated policies that can also be sampled; ``rules`` turn their gradients into updates; ``lines``
gives the exact effect of a step. Each experiment (``threshold``, ``collapse``, ``scaling``, ``stagnation``,
``coverage``) is one command of ``python -m rlvr_fast.simulate`` and uses the package as it is: what it reports about
the estimators is what their users get.
"""
