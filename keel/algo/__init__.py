"""Pure functions of tensors: advantages, corrections, losses and how they are reduced to one number."""
