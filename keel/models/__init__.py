"""Models: `transformers` modules, loaded and fitted for training and sampling with the same bits."""
