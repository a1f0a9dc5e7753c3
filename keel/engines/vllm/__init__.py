"""vLLM as the engine: its server started or attached to, its answers read strictly, its death survived."""
