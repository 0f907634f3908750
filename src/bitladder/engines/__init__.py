"""Whatever runs a model for a user."""
