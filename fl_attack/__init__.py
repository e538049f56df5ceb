"""Label-flipping attacks on federated learning, on Flower and Ray."""

__version__ = "0.1.0"
