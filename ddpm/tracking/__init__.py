"""MLflow as a mirror of a run's folder."""
