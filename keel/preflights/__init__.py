"""Before a run: is this stack fit for on-policy training, and if not, why? The function is `keel.preflight`."""
