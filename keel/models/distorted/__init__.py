"""Faults planted in a model's configuration, weights, modules and tokens; the engine's and the learner's alike."""
