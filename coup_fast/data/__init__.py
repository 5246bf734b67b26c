"""Image data: one reader for all formats, loaders of standard files, and the held-out digits."""

from coup_fast.data.cifar10 import load_cifar10
from coup_fast.data.digits import demo_digits, held_out_mask
from coup_fast.data.mnist import load_fashion_mnist, load_mnist
from coup_fast.data.pictures import Look
from coup_fast.data.reading import Labelled, Source, find_source, read_images
from coup_fast.data.svhn import load_svhn

__all__ = [
    "Labelled",
    "Look",
    "Source",
    "demo_digits",
    "find_source",
    "held_out_mask",
    "load_cifar10",
    "load_fashion_mnist",
    "load_mnist",
    "load_svhn",
    "read_images",
]
