"""Sources of images: digits, Fashion-MNIST, image folders, Hugging Face, torchvision, data sets in Python."""
