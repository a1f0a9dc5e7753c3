"""Who samples. `base` holds the protocol (no torch); `embedded` samples in process, `process` in another one."""
