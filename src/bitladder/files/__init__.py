"""Disk and network: the only modules that open files or sockets for models."""
