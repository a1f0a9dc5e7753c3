"""Where the learner runs: its processes, and how parameters are sharded over them."""
