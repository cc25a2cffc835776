"""Quality, cost and time of a schedule against the uncached run and against fewer steps."""
