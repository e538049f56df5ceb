"""Datasets as arrays, and who holds which sample."""

from fl_attack.data.dataset import Dataset, Stored, features, load
from fl_attack.data.partition import PARTITIONERS, Partition, partition
from fl_attack.data.sources import SOURCES

__all__ = ["PARTITIONERS", "SOURCES", "Dataset", "Partition", "Stored", "features", "load", "partition"]
