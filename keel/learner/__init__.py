"""Who learns: a policy, its optimizer and its checkpoints, in one process or several behind the same methods."""
