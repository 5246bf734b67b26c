"""Image data: loaders for the standard files of MNIST and CIFAR-10, and the held-out digits."""

from coup_fast.data.cifar10 import load_cifar10
from coup_fast.data.digits import demo_digits, held_out_mask
from coup_fast.data.mnist import load_mnist

__all__ = ["demo_digits", "held_out_mask", "load_cifar10", "load_mnist"]
