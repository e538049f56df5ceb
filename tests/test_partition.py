"""Partitions: everyone holds something, shares are exact, the malicious clients are nested."""

import inspect
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from fl_attack.data import PARTITIONERS, Partition, partition
from fl_attack.errors import InputError

CONF = Path(__file__).resolve().parent.parent / "conf" / "partition"
MILD = {"iid": {}, "dirichlet": {"alpha": 50.0}, "shards": {"s": 2}}  # settings that can be met

# `given` takes who holds what from a file, `hf` leaves it to another library: they have tests of their own
DEALS = [name for name in PARTITIONERS if name not in ("given", "hf")]

names = st.sampled_from(DEALS)
seeds = st.integers(0, 2**32)
some_labels = st.builds(
    lambda n, classes, seed: np.random.default_rng(seed).integers(0, classes, n),
    st.integers(100, 300),
    st.integers(2, 5),
    seeds,
)


def dealt(labels, name, **settings) -> Partition:
    return partition(labels, name=name, **MILD[name], **settings)


@given(some_labels, names, st.integers(0, 4), st.integers(0, 4), seeds)
def test_every_sample_has_one_client_and_every_client_a_sample(labels, name, honest, malicious, seed):
    assume(honest + malicious)
    parts = dealt(labels, name, honest=honest, malicious=malicious, seed=seed)
    assert parts.client.dtype == np.int64 and parts.client.shape == labels.shape
    assert len(parts.shards) == honest + malicious
    for client, shard in enumerate(parts.shards):
        np.testing.assert_array_equal(shard, np.flatnonzero(parts.client == client))
        assert len(shard)
    assert len(parts.malicious) == malicious
    assert (np.diff(parts.malicious) > 0).all() and set(parts.malicious) <= set(range(honest + malicious))


@given(some_labels, names, st.integers(1, 6), seeds)
def test_malicious_clients_are_nested_in_one_partition(labels, name, total, seed):
    parts = [dealt(labels, name, honest=total - f, malicious=f, seed=seed) for f in range(total + 1)]
    for fewer, more in pairwise(parts):
        np.testing.assert_array_equal(fewer.client, more.client)
        assert set(fewer.malicious) < set(more.malicious)


@pytest.mark.parametrize("name", DEALS)
@pytest.mark.parametrize("share", [None, 0.3])
def test_the_seed_decides_all(name, share):
    labels = np.arange(200) % 4
    one, same, other = (
        dealt(labels, name, honest=5, malicious=5, seed=seed, malicious_share=share) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.client, same.client)
    np.testing.assert_array_equal(one.malicious, same.malicious)
    assert (one.client != other.client).any() and (one.malicious != other.malicious).any()


def test_every_client_is_malicious_for_some_seed():
    labels = np.arange(40)
    drawn = {int(partition(labels, honest=4, malicious=1, seed=seed).malicious[0]) for seed in range(60)}
    assert drawn == set(range(5))


@given(some_labels, st.integers(1, 9), seeds)
def test_iid_shards_differ_by_at_most_one(labels, clients, seed):
    sizes = [len(shard) for shard in partition(labels, honest=clients, malicious=0, seed=seed).shards]
    assert max(sizes) - min(sizes) <= 1


def test_iid_shards_hold_every_class_alike():
    labels = np.repeat([0, 1], 500)
    ones = [labels[shard].sum() for shard in partition(labels, honest=10, malicious=0, seed=0).shards]
    assert 25 < min(ones) < 50 < max(ones) < 75  # about 50 of 100, but not dealt class by class


@given(some_labels, names, st.integers(1, 3), st.integers(1, 3), st.floats(0.2, 0.8), seeds)
def test_the_malicious_share_is_exact(labels, name, honest, malicious, share, seed):
    parts = dealt(labels, name, honest=honest, malicious=malicious, seed=seed, malicious_share=share)
    assert np.isin(parts.client, parts.malicious).sum() == round(share * len(labels))
    assert np.bincount(parts.client, minlength=honest + malicious).min() > 0
    if name == "iid":
        sizes = np.bincount(parts.client)
        for group in (parts.malicious, np.setdiff1d(np.arange(honest + malicious), parts.malicious)):
            assert np.ptp(sizes[group]) <= 1


def test_the_malicious_share_is_drawn_at_random():
    labels = np.repeat([0, 1], 500)
    parts = partition(labels, honest=3, malicious=2, seed=0, malicious_share=0.4)
    assert 150 < labels[np.isin(parts.client, parts.malicious)].sum() < 250


def largest_class_share(labels, alpha):
    parts = partition(labels, honest=10, malicious=0, seed=0, name="dirichlet", alpha=alpha)
    return np.mean([np.bincount(labels[shard]).max() / len(shard) for shard in parts.shards])


def test_a_smaller_alpha_gives_more_skewed_clients():
    labels = np.arange(5000) % 10
    skew = [largest_class_share(labels, alpha) for alpha in (0.1, 1.0, 1e5)]
    assert skew[0] > 0.5 > skew[1] > 0.2 > skew[2]


def test_a_huge_alpha_gives_each_client_its_part_of_each_class():
    labels = np.arange(5000) % 10
    parts = partition(labels, honest=10, malicious=0, seed=0, name="dirichlet", alpha=1e7)
    for shard in parts.shards:
        np.testing.assert_allclose(np.bincount(labels[shard], minlength=10), 50, atol=2)


def test_classes_get_proportions_of_their_own():
    labels = np.arange(5000) % 2
    parts = partition(labels, honest=2, malicious=0, seed=0, name="dirichlet", alpha=1.0)
    first, second = np.bincount(labels[parts.shards[0]], minlength=2)
    assert abs(first - second) > 100


def test_dirichlet_parts_of_a_class_are_drawn_at_random():
    parts = partition(np.zeros(1000, int), honest=2, malicious=0, seed=0, name="dirichlet", alpha=100.0)
    assert 400 < np.count_nonzero(np.diff(parts.client)) < 600  # not the first half and the second


def test_an_empty_dirichlet_client_is_drawn_anew():
    labels = np.zeros(30, int)
    for seed in range(20):
        shards = partition(labels, honest=5, malicious=0, seed=seed, name="dirichlet", alpha=0.5).shards
        assert len(shards) == 5 and min(map(len, shards)) > 0


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), seeds)
def test_shards_hold_s_equal_pieces_of_sorted_labels(clients, s, size, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(clients * s), size))
    parts = partition(labels, honest=clients, malicious=0, seed=seed, name="shards", s=s)
    for shard in parts.shards:
        assert np.unique(labels[shard], return_counts=True)[1].tolist() == [size] * s


def test_pieces_are_dealt_at_random():
    labels = np.repeat(np.arange(20), 3)
    parts = partition(labels, honest=10, malicious=0, seed=0, name="shards", s=2)
    gaps = [np.ptp(labels[shard]) for shard in parts.shards]
    assert len(set(gaps)) > 3


@pytest.mark.parametrize(
    ("word", "settings"),
    [
        ("10 samples are too few for 11 clients", {"honest": 11}),
        ("clients.honest=0, clients.malicious=0", {"honest": 0}),
        ("clients.honest=-1", {"honest": -1, "malicious": 3}),
        ("iid, dirichlet, shards", {"name": "idd"}),
        ("partition.alpha=None", {"name": "dirichlet"}),
        ("partition.alpha=0", {"name": "dirichlet", "alpha": 0.0}),
        ("partition.alpha=nan", {"name": "dirichlet", "alpha": float("nan")}),
        ("raise alpha or use fewer clients", {"name": "dirichlet", "alpha": 1e-4, "honest": 8}),
        ("partition.s=None", {"name": "shards"}),
        ("partition.s=0", {"name": "shards", "s": 0}),
        ("use at most s=2", {"name": "shards", "s": 3}),
        ("with 0 malicious", {"malicious_share": 0.5}),
        ("0 honest", {"malicious_share": 0.5, "honest": 0, "malicious": 2}),
        ("partition.malicious_share=1.0", {"malicious_share": 1.0, "malicious": 2}),
        ("partition.malicious_share=0.0", {"malicious_share": 0.0, "malicious": 2}),
        ("1 samples are too few for 2 malicious clients", {"malicious_share": 0.1, "malicious": 2}),
        ("1 samples are too few for 4 honest clients", {"malicious_share": 0.9, "malicious": 2}),
    ],
)
def test_what_cannot_be_met_is_refused_in_one_line(word, settings):
    with pytest.raises(InputError) as caught:
        partition(np.arange(10) % 2, **{"honest": 4, "malicious": 0, "seed": 0} | settings)
    assert word in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_labels_are_not_changed():
    labels = np.arange(50) % 3
    for name in DEALS:
        dealt(labels, name, honest=3, malicious=2, seed=0, malicious_share=0.4)
    np.testing.assert_array_equal(labels, np.arange(50) % 3)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_every_partitioner_has_a_yaml_that_works(name, tmp_path):
    np.save(tmp_path / "users.npy", np.arange(100) % 4)
    content = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert content["name"] == name and set(content) <= set(inspect.signature(partition).parameters)
    content |= {"path": tmp_path / "users.npy"} if name == "given" else {}
    assert len(partition(np.arange(100) % 4, honest=3, malicious=1, seed=0, **content).shards) == 4


# Skewed deals favour nobody; natural users.


@pytest.mark.parametrize("alpha", [0.01, 0.3, 10.0, 1e6])
def test_a_dirichlet_deal_favours_no_client(alpha):
    labels = np.arange(1437) % 10
    sizes, held = np.zeros((2, 100, 100))
    for seed in range(100):
        rng = np.random.default_rng(seed)
        client = PARTITIONERS["dirichlet"](labels, 100, rng, alpha=alpha, least=0)
        sizes[seed] = np.bincount(client, minlength=100)
        held[seed] = [len(np.unique(labels[client == one])) for one in range(100)]
    for values in (sizes, held):
        first, others = values[:, 0], values[:, 1:]
        assert abs(first.mean() - others.mean()) < 4 * values.std() / 10 + 0.05
    if alpha == 1e6:
        assert np.abs(sizes - 14.37).max() < 8


def test_a_dirichlet_deal_has_at_least_so_many_samples():
    labels = np.arange(300) % 3
    parts = partition(labels, honest=8, malicious=2, seed=0, name="dirichlet", alpha=1.0, min_samples=12)
    assert np.bincount(parts.client).min() >= 12
    with pytest.raises(InputError, match=r"fewer than 30 samples in 100 draws; .* or lower partition.min_samples"):
        partition(labels, honest=8, malicious=2, seed=0, name="dirichlet", alpha=0.1, min_samples=30)


@given(some_labels, st.integers(2, 8), st.floats(0.02, 50), seeds)
def test_a_balanced_dirichlet_deal_gives_everyone_as_much(labels, clients, alpha, seed):
    parts = partition(labels, honest=clients, malicious=0, seed=seed, name="dirichlet", alpha=alpha, balanced=True)
    assert np.ptp(np.bincount(parts.client, minlength=clients)) <= 1


def test_a_balanced_dirichlet_deal_is_skewed_by_alpha():
    labels = np.arange(2000) % 10

    def share_of_largest(alpha):
        parts = partition(labels, honest=10, malicious=0, seed=0, name="dirichlet", alpha=alpha, balanced=True)
        return np.mean([np.bincount(labels[shard]).max() / len(shard) for shard in parts.shards])

    assert share_of_largest(0.05) > 0.4 > 0.2 > share_of_largest(1000.0)


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".txt"])
def test_users_can_be_given_in_a_file(tmp_path, suffix):
    users = np.random.default_rng(0).permutation(np.arange(60) % 5)
    file = tmp_path / f"users{suffix}"
    if suffix == ".npz":
        np.savez(file, client=users)
    elif suffix == ".npy":
        np.save(file, users)
    else:
        file.write_text("\n".join(map(str, users)))
    settings = {"honest": 3, "malicious": 2, "seed": 0, "name": "given", "path": file}
    np.testing.assert_array_equal(partition(np.arange(60) % 2, **settings).client, users)
    held = partition(np.arange(60) % 2, **settings, held_out=0.2)
    kept = held.client >= 0
    assert (~kept).sum() == 12
    np.testing.assert_array_equal(held.client[kept], users[kept])


@pytest.mark.parametrize(
    ("content", "more", "word"),
    [
        ("0 1 2", {}, "wanted: a whole number for each of 6 samples"),
        ("0 1 2 0 1 7", {"honest": 3, "malicious": 1}, "not each of 0, 1, 2"),
        ("0 1 2 0 1 2", {"honest": 4}, "holds 3 clients, but clients.total=5; use clients.total=3"),
        ("a b", {}, "can't be read as clients"),
        ("0 1 2 0 1 2", {"malicious_share": 0.5}, "has no meaning with partition=given"),
        ("0 1 2 0 1 2", {"min_samples": 3}, "client 0 of 3 has 2 samples"),
        (None, {}, "can't be read"),
    ],
)
def test_a_file_of_users_that_can_not_be_is_refused(tmp_path, content, more, word):
    if content is not None:
        (tmp_path / "users.txt").write_text(content)
    with pytest.raises(InputError, match=word):
        partition(
            np.arange(6) % 2,
            **{"honest": 2, "malicious": 1, "seed": 0, "name": "given", "path": tmp_path / "users.txt"} | more,
        )


def test_partitioners_of_flower_datasets_deal_each_sample_once_and_what_they_promise() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 400)
    deals = {
        "IidPartitioner": {},
        "LinearPartitioner": {},
        "DirichletPartitioner": {"alpha": 0.5, "min_partition_size": 1},
        "PathologicalPartitioner": {"num_classes_per_partition": 2, "class_assignment_mode": "first-deterministic"},
    }
    for name, args in deals.items():
        found, again, other = (
            partition(labels, honest=3, malicious=1, seed=seed, name="hf", partitioner=name, args=args)
            for seed in (0, 0, 1)
        )
        assert np.array_equal(found.client, again.client)
        assert not np.array_equal(found.client, other.client)
        sizes = np.bincount(found.client)
        held = [len(np.unique(labels[found.client == client])) for client in range(4)]
        if name == "LinearPartitioner":
            assert sizes.tolist() == [40, 80, 120, 160]
        if name == "PathologicalPartitioner":
            assert max(held) == 2


@pytest.mark.parametrize(
    ("partitioner", "args", "message"),
    [
        ("MinePartitioner", {}, "partitioner=MinePartitioner is unknown; use one of .*DirichletPartitioner"),
        ("IidPartitioner", {"size": 3}, "args={'size': 3}: .*size"),
        ("SizePartitioner", {"partition_sizes": [10, 10]}, "makes 2 partitions, but clients.total=4|partition_sizes"),
    ],
)
def test_a_partitioner_that_is_none_is_told_with_the_way_out(partitioner: str, args: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        partition(np.arange(40) % 4, honest=3, malicious=1, seed=0, name="hf", partitioner=partitioner, args=args)
