"""The gap between engine and learner, token by token: its statistics, its worst tokens, and other people's logs."""
