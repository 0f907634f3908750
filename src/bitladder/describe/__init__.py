"""Descriptions of what we have: a model, a machine, a workload. Values only; files/ reads them from disk."""
