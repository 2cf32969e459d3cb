"""Delivery of metrics and images to MLflow."""
