"""Policy: functions from values to a choice with its reason."""
