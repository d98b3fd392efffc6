"""The records that every part of the compiler shares: programs, layers, shards, schedules, weight tables."""
