"""Cost and fidelity of ``rf.ModelGap`` on the CPU: ``python bench/model_gap/run.py`` (see docs/model_gap/README.md).

``language_model.py`` and ``step.py`` are what is measured, ``providers.py`` who does it, ``cost.py`` how long it takes
and how much memory; ``sampled.py``, ``truth.py`` and ``fidelity.py`` compare gap norms on rollouts of SmolLM2-135M.
"""
