"""Keel: agentic reinforcement learning where the policy that learns is the policy that acted."""

__version__ = "0.1.0"
