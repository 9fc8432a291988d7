"""The processes, on one machine or several, that share one job."""
