"""Ray pools, the Redis store, configuration and launch; imports everyone, nobody imports it."""
