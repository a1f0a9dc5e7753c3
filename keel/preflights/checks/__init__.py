"""The questions of a preflight, a module for each part of the stack; `keel.preflights.runner` asks them in order."""
