"""Quality of images: metrics with their uncertainty."""
