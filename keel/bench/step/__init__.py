"""The whole training step, Keel's beside that of TRL's GRPOTrainer: the same model, prompts, lengths and updates."""
