"""The evidence database."""
