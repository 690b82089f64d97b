"""Experiments on how a frozen model knows where things are, each with a control that can say no.

``dualstream analyze where`` runs them. An experiment is one class (``experiment.Experiment``) and one row of
``experiment.EXPERIMENTS``; it works on a ``bench.Bench``: a model and pairs of objects in four relations.
"""
