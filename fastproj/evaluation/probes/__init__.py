"""Features -> accuracy: the probes.

A probe is a function of ``Features`` of train and val and plain arguments that returns a
``ProbeResult``; ``fastproj.evaluation.PROBES`` names them. A probe chooses its settings without
``val``. Accuracies are fractions in [0, 1].
"""
