"""Datasets as arrays, and who holds which sample."""

from fl_attack.data.dataset import Dataset, Scaling, Stored, features, load
from fl_attack.data.partition import PARTITIONERS, Partition, partition
from fl_attack.data.sources import SOURCES

__all__ = ["PARTITIONERS", "SOURCES", "Dataset", "Partition", "Scaling", "Stored", "features", "load", "partition"]
