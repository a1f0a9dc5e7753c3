"""Weights from the learner to the engine. Importing this package loads no torch; `publish` and `transports` do."""
