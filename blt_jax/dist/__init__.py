"""Meshes, sharding rules and start-up on several hosts."""
