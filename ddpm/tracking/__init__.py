"""Metrics and pictures on their way to MLflow."""
