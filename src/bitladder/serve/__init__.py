"""The gateway and its page."""
