"""Runs that ship with Keel, as TOML files."""
