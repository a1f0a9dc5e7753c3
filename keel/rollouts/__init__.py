"""Environment x engine -> groups: episodes, their scheduling, their records. No torch."""
