"""Descriptions of what we have: a model, a machine, a workload. Values only; reading them from disk is done in files/."""
